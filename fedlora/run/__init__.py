"""One run: its setup from a config, its directory, what the console shows, export and the privacy report."""
