"""What a data set is, and the way from its shards to batches."""
