"""One file per family of formats: files -> samples, and what was unusable in them."""
