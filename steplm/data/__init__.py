"""Data: from text to token shards (``prepare``), and from token shards to batches (``tokens``, ``loader``)."""
