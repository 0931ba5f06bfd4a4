"""Stages, the loop that runs them, and the engine underneath."""
