"""Attention backends: metadata, builder and implementation, per device."""
