"""The Flower client: a Worker behind messages, and what it keeps on its own disk."""
