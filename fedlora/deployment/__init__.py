"""What both sides need on real machines: keys, certificates, processes, JSON logs."""
