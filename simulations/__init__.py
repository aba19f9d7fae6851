"""Fleets for one machine, and the settings of the runs that were made."""
