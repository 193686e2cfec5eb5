"""What a model says and draws, as figures."""
