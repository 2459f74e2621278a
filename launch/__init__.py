"""Starts the other packages, of which it knows the command lines only."""
