"""Weights files: identify and load checkpoints of any origin, read and write this project's own, export."""
