"""Encoders, decoder, masking, objectives and the pre-training model, in plain torch without distributed code."""
