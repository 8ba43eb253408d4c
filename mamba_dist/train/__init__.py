"""Composition of a run and its loop; the only reader of the whole configuration."""
