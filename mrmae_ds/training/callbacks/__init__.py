"""Actions around the steps of training."""
