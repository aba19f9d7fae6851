"""Benchmarks and experiments, one command each; not part of the wheel."""
