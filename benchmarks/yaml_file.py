"""Reads what a benchmark's YAML file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vllm_attnedit.errors import AttnEditError


def read_yaml(path: Path, what: str = "a YAML file") -> Any:
    """The plain values of a file.

    Args:
        path: of the file.
        what: it should be.

    Raises:
        AttnEditError: naming the file, if it cannot be read or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AttnEditError(str(path), error.strerror, f"give {what}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AttnEditError(str(path), error, "mend the YAML") from error
