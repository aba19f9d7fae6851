"""A server's processes on a real machine: the supervisor, the gateway, Flower's ServerApp, metrics."""
