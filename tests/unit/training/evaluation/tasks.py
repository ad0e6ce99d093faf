"""Tasks of every kind that a file can hold."""

from __future__ import annotations

from typing import Any

TASKS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"query": f"the {w}", "choices": ["land", "rain over the", "inner"], "gold": i % 3}
        for i, w in enumerate(["rain", "land", "anger", "theory", "inner", "thing"])
    ],
    "contexts": [
        {"context_options": ["the rain", "the land in"], "continuation": f"{w} ran", "gold": i % 2}
        for i, w in enumerate(["he", "there", "and"])
    ],
    "words": [{"context": "the rain over the", "continuation": w} for w in ("land", "rain")],
}
