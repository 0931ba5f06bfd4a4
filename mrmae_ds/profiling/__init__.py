"""FLOP counts and peak throughput of devices."""
