"""Finds the settings with which a run trains the most pairs per second, without changing what it computes."""
