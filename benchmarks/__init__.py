"""Benchmarks and experiments, one command each; not part of the wheel."""

from fedlora.environment import configure_libraries

configure_libraries()
