"""Experiments of papers as settings that are kept, and a verdict on each published number."""
