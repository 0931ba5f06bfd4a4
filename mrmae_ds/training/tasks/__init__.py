"""Tasks: what each training stage computes on a batch."""
