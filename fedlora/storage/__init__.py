"""What lies on a disk, and how it survives a crash."""
