"""Committed, hashed checkpoints that any engine and any number of ranks can read; never decides when."""
