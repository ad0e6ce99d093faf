"""Stage 2 on one device and on several: the same losses, more tokens a second, one checkpoint."""
