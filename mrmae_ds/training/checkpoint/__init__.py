"""Checkpoints: saving, verification, resuming, conversion to other numbers of ranks."""
