"""Benchmarks: kernels and serving, each writing results with their provenance."""
