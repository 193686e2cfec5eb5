"""Models and data that PyPI packages carry, made ready: an image classifier, a language model, questions, photographs."""
