"""Unlabelled photographs: grouped by what their objects look like, named, and shown."""
