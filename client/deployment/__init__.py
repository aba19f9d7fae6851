"""A client's processes on a real machine: the supervisor, the warm worker, Flower's ClientApp."""
