"""Teacher sources: open_clip, timm and checkpoints of this project."""
