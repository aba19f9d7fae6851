"""`fedlora doctor`: whether a site is ready to take part in a run."""
