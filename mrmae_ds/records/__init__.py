"""Run records, metrics and environment of a training run."""
