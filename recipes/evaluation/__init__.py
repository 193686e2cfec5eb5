"""How well a model names, answers, sees and draws: figures for `recipes/evaluate.py` and questions while training."""
