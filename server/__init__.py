"""The Flower server: a ServerApp, and a Fleet on Flower's Grid."""
