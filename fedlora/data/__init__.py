"""Data: files to rows, and rows to clients."""
