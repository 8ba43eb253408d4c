"""From text to batches: sources → tokenization → shards and manifest → order → batches."""
