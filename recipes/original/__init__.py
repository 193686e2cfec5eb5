"""The released model: its sizes, its names of tensors, the way from them to ours."""
