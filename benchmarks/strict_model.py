"""Options of a YAML file that pydantic checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_attnedit.errors import AttnEditError


class StrictModel(BaseModel):
    """A section of the file; what it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=StrictModel)


def validated(model: type[Model], data: Any, path: Path) -> Model:
    """Plain values of a file as its checked options.

    Args:
        model: of the whole file.
        data: plain values.
        path: of the file, for messages.

    Raises:
        AttnEditError: naming the file, the first wrong field and what is wrong with it.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        shown = first["input"] if not isinstance(first["input"], dict) else "..."
        raise AttnEditError(f"{path}: {field}", shown, first["msg"]) from error
