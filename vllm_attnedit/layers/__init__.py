"""Edited attention as vLLM layers."""
