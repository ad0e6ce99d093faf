"""Benchmarks of the served models."""
