"""A comparison: many runs of one job that differ in strategy, seed and settings, and the table of what came of them."""
