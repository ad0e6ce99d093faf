"""The one exception for input a user can mend: it names the field, the value and the fix."""

from __future__ import annotations


class AttnEditError(ValueError):
    """Bad input. Its text is one line; commands print it and exit with status 2.

    Args:
        field: what was wrong, as the user spells it (``--window``, a config field, a file).
        value: the offending value.
        fix: what to do instead, as an imperative sentence without a full stop.
    """

    def __init__(self, field: str, value: object, fix: str) -> None:
        self.field = field
        self.value = value
        self.fix = fix
        # One line even where the value is a long list or carries line breaks.
        shown = " ".join(str(value).split())
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(f"{field}: {shown}: {fix}")
