"""From a corpus to the shards of a data set: units, workers, a journal, and the merge."""
