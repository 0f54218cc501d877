"""Draws pages to look at: reports of runs and of clocks."""
