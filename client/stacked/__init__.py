"""Many clients trained in one pass over one frozen base: every row of a batch with its own client's adapter."""
