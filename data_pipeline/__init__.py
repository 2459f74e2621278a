"""From images and masks to batches: shards, order, reading, views and loaders."""

__version__ = "0.1.0"
