"""vLLM reads these at import. In one process and uncompiled, an engine starts in seconds."""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    TORCHDYNAMO_DISABLE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)

# vLLM's CPU worker replaces helpers of its other modules as it is imported; those imported before
# it keep the ones for a GPU. An engine's own process imports it in time, a test run may not.
import vllm.v1.worker.cpu_worker  # noqa: F401
