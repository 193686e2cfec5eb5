"""From files on disk to samples: which reader reads what, and what a sample may hold."""
