"""What a vLLM process knows after it has loaded its plugins, as every vLLM process does."""

from __future__ import annotations

import json

ARCHITECTURE = "AttnEditForCausalLM"


def main() -> None:
    """Print whether the edited architecture is registered, its class, and vLLM's platform."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    registered = ARCHITECTURE in ModelRegistry.get_supported_archs()
    cls = ModelRegistry.models[ARCHITECTURE].load_model_cls() if registered else None
    print(
        json.dumps(
            {
                "registered": registered,
                "class": f"{cls.__module__}.{cls.__name__}" if cls else None,
                "platform": current_platform.device_type,
            }
        )
    )


if __name__ == "__main__":
    main()
