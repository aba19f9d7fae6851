"""What travels between server and clients, and in what form."""
