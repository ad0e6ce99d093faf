"""Scripts that the checks run in processes of their own; each prints one JSON object.

They run by path, so that a probe finds ``vllm_attnedit`` only where vLLM would find it too.
"""
