"""Teacher, untrained edit, trained edit and training-free baselines, side by side."""
