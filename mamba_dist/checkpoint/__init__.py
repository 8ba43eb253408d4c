"""Committed, hashed checkpoints for any engine and number of ranks; never decides when."""
