"""Measures of what the embeddings know: K-means, linear classifier, and a report to look at."""
