"""Training on the GPU stand-in: every stage, engine and placement on ``cuda`` devices, without a GPU."""
