"""Mechanisms of privacy: accounting, noise, DP-SGD, client-level DP, secure aggregation."""
