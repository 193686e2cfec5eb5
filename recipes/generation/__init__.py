"""Text, drawn images and reconstructions from a checkpoint."""
