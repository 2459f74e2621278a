"""Saliency masks for people who have images and nothing else."""
