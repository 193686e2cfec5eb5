"""The released model: its sizes, its names of tensors, and their conversion to this package."""
