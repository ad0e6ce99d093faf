"""Names on a command line."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from vllm_attnedit.errors import AttnEditError


def check_known(option: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that is not among those there are.

    Raises:
        AttnEditError: for the first such name, with the names there are.
    """
    for name in names:
        if name not in known:
            raise AttnEditError(option, name, f"use one of {', '.join(known)}")
