"""Faster forms of what a network computes, each held by a test to the plain form; and the precision that a run chooses.

The forms that change how a network computes are context managers over it, and restore it.
"""
