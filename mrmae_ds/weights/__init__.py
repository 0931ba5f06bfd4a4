"""Weights: loading checkpoints of any origin, identification, export."""
