"""FLOP counts of recipes, and peak throughput of GPUs."""
