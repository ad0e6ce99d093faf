"""Turns YAML and ``--key value`` into a checked :class:`training.config.Config`, and back.

Unknown keys, wrong types and impossible values are refused with the field, the value and the fix.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from training.config import Config
from training.ranges import check_ranges
from vllm_attnedit.errors import AttnEditError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``--key value`` pairs.

    Args:
        path: YAML file.
        overrides: what followed it on the command line; ``--key=value`` is taken as well.

    Raises:
        AttnEditError: naming the field, the value and the fix.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AttnEditError(
            "CONFIG", path, f"give a readable YAML file ({error.strerror})"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AttnEditError(
            "CONFIG", path, f"mend the YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(data, dict):
        raise AttnEditError("CONFIG", path, "give a YAML file with keys such as teacher and output")
    apply_overrides(data, overrides)
    return config_from_dict(data)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set ``--key value`` pairs in nested plain values. Raises as :func:`load_config`."""
    for key, text in _pairs(overrides):
        set_option(data, key, _scalar(text))


def config_from_dict(data: dict[str, Any]) -> Config:
    """A checked configuration from nested plain values. Raises as :func:`load_config`."""
    config: Config = build(Config, data)
    check_ranges(flatten(config))
    return config


def build(cls: Any, data: Any) -> Any:
    """A dataclass of :func:`training.config.option` fields from nested plain values.

    Raises:
        AttnEditError: for unknown keys, with the nearest known one, and for wrong types.
    """
    return _build(cls, data, "", [name for name, _, _ in describe_options(cls)])


def flatten(config: Any) -> dict[str, Any]:
    """Every value by its dotted name; lists and free dictionaries stay whole."""
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for item in fields(node):
            value = getattr(node, item.name)
            if is_dataclass(value):
                walk(value, f"{prefix}{item.name}.")
            elif isinstance(value, list) and value and is_dataclass(value[0]):
                found[prefix + item.name] = [asdict(part) for part in value]
            else:
                found[prefix + item.name] = value

    walk(config, "")
    return found


def describe_options(root: Any = Config) -> list[tuple[str, str, str]]:
    """(dotted name, default, meaning) of every option below a dataclass."""

    def walk(cls: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
        hints = get_type_hints(cls)
        for item in fields(cls):
            name, hint = prefix + item.name, hints[item.name]
            if is_dataclass(hint):
                yield from walk(hint, f"{name}.")
                continue
            default = item.default
            if default is MISSING and item.default_factory is not MISSING:
                default = item.default_factory()
            shown = "required" if default is MISSING else yaml.safe_dump(default).split("\n")[0]
            yield name, shown, item.metadata["doc"]
            dots = f"{name}.N." if get_origin(hint) is list else f"{name}."
            for part in get_args(hint):
                if is_dataclass(part):
                    yield from walk(part, dots)

    return list(walk(root, ""))


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or len(key) < 3:
            raise AttnEditError("command line", key, "give overrides as --key value")
        key, found, value = key[2:].partition("=")
        if not found:
            if not rest:
                raise AttnEditError(f"--{key}", "", "give a value after it")
            value = rest.pop(0)
        yield key, value


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def set_option(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a value by its dotted name in nested plain values. Raises as :func:`load_config`."""
    node: Any = data
    *path, last = dotted.replace("-", "_").split(".")
    for key in path:
        if isinstance(node, list):
            node = node[_index(node, key, dotted)]
            continue
        if not isinstance(node.get(key), dict | list):
            node[key] = {}
        node = node[key]
    if isinstance(node, list):
        node[_index(node, last, dotted)] = value
    else:
        node[last] = value


def _index(node: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise AttnEditError(f"--{dotted}", key, f"use an index below {len(node)}")
    return int(key)


def _unknown(
    name: str, known: Sequence[str], prefix: str, everywhere: Sequence[str]
) -> AttnEditError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    # A key may also be right but in another section.
    homes = [full for full in everywhere if full.rsplit(".", 1)[-1] == name]
    if homes:
        fix = f"this option is called {homes[0]}"
    elif nearest:
        fix = f"no such option; the nearest is {prefix}{nearest[0]}"
    else:
        fix = f"no such option; known here are {', '.join(known)}"
    return AttnEditError("unknown key", prefix + name, fix)


def _build(cls: Any, data: Any, prefix: str, everywhere: Sequence[str]) -> Any:
    where = prefix.rstrip(".") or "CONFIG"
    if not isinstance(data, dict):
        raise AttnEditError(where, data, "give keys and values below it")
    hints = get_type_hints(cls)
    known = [item.name for item in fields(cls)]
    for name in data:
        if name not in known:
            raise _unknown(str(name), known, prefix, everywhere)
    values: dict[str, Any] = {}
    for item in fields(cls):
        if item.name in data:
            full = prefix + item.name
            values[item.name] = _convert(hints[item.name], data[item.name], full, everywhere)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise AttnEditError(prefix + item.name, "missing", f"give it: {item.metadata['doc']}")
    return cls(**values)


def _convert(hint: Any, value: Any, name: str, everywhere: Sequence[str]) -> Any:
    """``value`` as the annotation asks; numbers may come as text, since YAML reads 1e-3 as one."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        some = next(part for part in arguments if part is not type(None))
        return _convert(some, value, name, everywhere)
    if is_dataclass(hint):
        return _build(hint, value, f"{name}.", everywhere)
    if origin is Literal:
        if value not in arguments:
            raise AttnEditError(name, value, f"use one of {', '.join(map(str, arguments))}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise AttnEditError(name, value, "give a list, such as [a, b]")
        return [
            _convert(arguments[0], part, f"{name}.{i}", everywhere) for i, part in enumerate(value)
        ]
    if origin is dict:
        if not isinstance(value, dict):
            raise AttnEditError(name, value, "give keys and values, such as {a: b}")
        if arguments[1] is Any:
            return dict(value)
        return {
            str(k): _convert(arguments[1], part, f"{name}.{k}", everywhere)
            for k, part in value.items()
        }
    if hint is bool:
        if not isinstance(value, bool):
            raise AttnEditError(name, value, "give true or false")
        return value
    if hint in (int, float):
        return _number(hint, value, name)
    if value is None or isinstance(value, dict | list):
        raise AttnEditError(name, value, "give a text")
    return str(value)


def _number(hint: type, value: Any, name: str) -> int | float:
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None or number != number or number in (float("inf"), float("-inf")):
        raise AttnEditError(name, value, "give a number")
    if hint is int:
        if number != int(number):
            raise AttnEditError(name, value, "give a whole number")
        return int(number)
    return number
