"""Runs as pages to look at: what their folders say, charts, and one HTML file that needs nothing else."""
