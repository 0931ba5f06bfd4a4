"""Data loaders: deterministic sampling, crops and augmentation over FFCV or Pillow."""
