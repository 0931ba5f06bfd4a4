"""The DeepSpeed engine: construction, precision, non-finite steps, communication volume."""
