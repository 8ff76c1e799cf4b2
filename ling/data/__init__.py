"""From raw text to tokens to batches; the order of the data depends on the seed and the samples consumed only."""
