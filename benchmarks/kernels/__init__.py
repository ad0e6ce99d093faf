"""Kernel benchmarks: ``python -m benchmarks.kernels``. One NVIDIA GPU; controls need vLLM."""
