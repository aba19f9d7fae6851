"""`fedlora plan`: what a run will send, take and spend, found before it starts."""
