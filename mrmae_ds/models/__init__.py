"""Encoders, decoder, pre-training model, weights in and out. No distributed code."""
