"""The synthetic world: scenes, drawing, vocabulary, writers of the real formats, small parts trained on it."""
