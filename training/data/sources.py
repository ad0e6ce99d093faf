"""Reads documents from where they are: files, chats, hub data sets, the teacher's own writing."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from training.config import SourceConfig
from training.data.chat import CONVERSATION_FIELDS, Message, read_messages
from training.files import sha256_of
from vllm_attnedit.errors import AttnEditError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".json")
TEXT_FIELDS = ("text", "content")
Item = str | list[Message]
"""A document before it is tokenised: plain text, or the messages of a conversation."""


def source_files(source: SourceConfig, field: str) -> list[Path]:
    """The files behind a source, sorted; none for a hub data set.

    Raises:
        AttnEditError: if there are none.
    """
    if source.kind == "hub":
        return []
    path = Path(source.path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in TEXT_SUFFIXES)
    else:
        files = sorted(Path(name) for name in glob.glob(source.path, recursive=True))
        files = [file for file in files if file.is_file()]
    if not files:
        fix = "give a text file, a folder of them or a glob that matches some"
        if source.kind == "teacher":
            fix = "write it first: python -m training generate CONFIG"
        raise AttnEditError(f"{field}.path", source.path, fix)
    return files


def describe_source(source: SourceConfig, field: str) -> dict[str, Any]:
    """What identifies a source's content: its settings, and the hash of each file."""
    found = source_files(source, field)
    base = Path(source.path)
    if not base.is_dir() and len({file.name for file in found}) < len(found):
        base = Path(os.path.commonpath(found))  # a glob over folders with files of one name
    files = {
        file.relative_to(base).as_posix() if base in file.parents else file.name: sha256_of(file)
        for file in found
    }
    settings = {k: v for k, v in asdict(source).items() if v is not None}
    # Where the files lie says nothing about what they hold.
    if files:
        settings["path"] = Path(source.path).name
    return settings | {"files": files}


def read_source(source: SourceConfig, field: str) -> Iterator[tuple[str, Item]]:
    """The documents of a source, in a fixed order, each with how messages name it.

    Records without text, and conversations without an answer, are left out.

    Args:
        source: where and what.
        field: how the user spells the source (``data.sources.0``).

    Raises:
        AttnEditError: for a file or record that cannot be read.
    """
    if source.kind == "hub":
        yield from _hub_items(source, field)
        return
    for file in source_files(source, field):
        if source.kind == "chat":
            for where, record in _json_records(file, field):
                if messages := read_messages(record, source.column, where):
                    yield where, messages
        elif source.kind == "teacher" or file.suffix in (".jsonl", ".json"):
            for where, record in _json_records(file, field):
                yield where, _text_of(record, source, where)
        else:
            text = _read_text(file, field)
            for part in text.split(source.separator) if source.separator else [text]:
                yield str(file), part


def _read_text(file: Path, field: str) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise AttnEditError(f"{field}.path", file, f"cannot be read: {error.strerror}") from error


def _json_records(file: Path, field: str) -> Iterator[tuple[str, Any]]:
    """JSON lines, or the members of one JSON array; each with how messages name it."""
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            whole = (line for line in lines if line.strip())
            first, second = next(whole, ""), next(whole, "")
            if first.lstrip().startswith("[") and not _is_one_of_many(first, second):
                for number, record in enumerate(json.loads(file.read_text(encoding="utf-8")), 1):
                    yield f"{file}, record {number}", record
                return
            for number, line in enumerate(chain(filter(None, (first, second)), whole), 1):
                yield f"{file}, record {number}", json.loads(line)
    except (OSError, ValueError) as error:
        behind = f"behind record {number}, " if number else ""
        fix = f"give JSON lines, or one JSON array: {behind}{error}"
        raise AttnEditError(f"{field}.path", file, fix) from error


def _is_one_of_many(first: str, second: str) -> bool:
    """Whether a line that begins a list is a record of its own: it ends, and another follows."""
    if not second:
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _text_of(record: Any, source: SourceConfig, where: str) -> str:
    names = (source.column,) if source.column else TEXT_FIELDS
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        for name in names:
            if isinstance(record.get(name), str):
                return str(record[name])
        if any(name in record and record[name] is None for name in names):
            return ""
    raise AttnEditError(
        where, f"no text in {' or '.join(names)}", "name the field as the source's column"
    )


def _hub_items(source: SourceConfig, field: str) -> Iterator[tuple[str, Item]]:
    # Slow to import, and needed by this kind alone.
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(source.path, source.name, split=source.split, streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ValueError, ConnectionError) as error:
        fix = f"check the id, name and split: {' '.join(str(error).split())}"
        raise AttnEditError(f"{field}.path", source.path, fix) from error
    for number, row in enumerate(_streamed(rows, source.path, field)):
        where = f"{source.path}, row {number}"
        chat = source.column in row if source.column else None
        column = source.column or next(
            (n for n in (*TEXT_FIELDS, *CONVERSATION_FIELDS) if n in row), None
        )
        if column is None or chat is False:
            known = ", ".join(row)
            raise AttnEditError(f"{field}.column", source.column, f"name one of {known}")
        if isinstance(row[column], str):
            yield where, row[column]
        elif row[column] is not None and (messages := read_messages(row, column, where)):
            yield where, messages


def _streamed(rows: Iterable[Any], path: str, field: str) -> Iterator[Any]:
    """Rows as they come over the network, which may break at any of them."""
    import httpx

    number, rest = 0, iter(rows)
    while True:
        try:
            row = next(rest)
        except StopIteration:
            return
        except (OSError, httpx.HTTPError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            fix = f"the hub does not answer after {number:,} rows ({reason}): start again"
            raise AttnEditError(f"{field}.path", path, fix) from error
        number += 1
        yield row
