"""Pipelines: the training jobs behind a table, their dependencies, and their execution on Slurm or locally."""
