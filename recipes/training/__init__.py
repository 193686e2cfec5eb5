"""A training run: its options, trainer, losses per step, parameter groups, adapters, latent cache, plan."""
