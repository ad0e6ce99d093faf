"""Numbers as users write and read them: ``8K`` tokens, ``40GiB``, ``1,2,4``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllm_attnedit.errors import AttnEditError

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL_UNITS = ("B", "KB", "MB", "GB", "TB")
_BYTES = {"": 1}
_BYTES |= {unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)}
_BYTES |= {unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)}
_NUMBER_AND_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(field: str, text: str) -> int:
    """Bytes from ``40GiB`` (powers of 1024), ``40GB`` (of 1000) or a plain number.

    Raises:
        AttnEditError: for anything else, a negative number included.
    """
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match and match[2].lower() in _BYTES:
        return int(float(match[1]) * _BYTES[match[2].lower()])
    raise AttnEditError(field, text, "give bytes >= 0 with a unit, as 40GiB, 512MiB or 24GB")


def parse_counts(field: str, texts: Iterable[str]) -> list[int]:
    """Positive integers from texts like ``8192``, ``8K`` (x 1024) and ``1,2,4``; no repetitions.

    Raises:
        AttnEditError: for anything else.
    """
    counts: list[int] = []
    for text in texts:
        for part in text.split(","):
            match = re.fullmatch(r"(\d+)([kK]?)", part.strip())
            count = int(match[1]) * (1024 if match[2] else 1) if match else 0
            if count < 1:
                raise AttnEditError(field, text, "give integers >= 1, as 8192, 8K or 1,2,4")
            if count not in counts:
                counts.append(count)
    return counts


def format_bytes(count: int) -> str:
    """At most four significant digits and a binary unit: ``40.5 KiB``."""
    value, unit = float(count), _BINARY_UNITS[0]
    for unit in _BINARY_UNITS:
        if abs(value) < 1024 or unit == _BINARY_UNITS[-1]:
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:,.{2 if abs(value) < 10 else 1}f} {unit}"
