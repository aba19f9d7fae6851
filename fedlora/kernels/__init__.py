"""Faster forms of what a network computes, each held by a test to the plain form.

Those that change how a network computes are context managers over it, and restore it.
"""
