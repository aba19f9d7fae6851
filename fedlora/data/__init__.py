"""Data: files to rows, rows to clients, rows to tensors."""
