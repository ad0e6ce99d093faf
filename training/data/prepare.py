"""Tokenises the sources of a run, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.config import DataConfig, SourceConfig
from training.data.chat import tokenize_chat
from training.data.shards import MANIFEST, ShardReader, ShardWriter
from training.data.sources import describe_source, read_source
from training.files import atomic_folder, digest
from vllm_attnedit.errors import AttnEditError

_BLOCK_CHARACTERS = 50_000
_BLOCKS = 256
_PROBE = "The quick brown fox: naïve café, 東京 12345\n\tif (x != y) { return; } 🙂"


def tokenizer_hash(tokenizer: Any) -> str:
    """What makes two tokenizers interchangeable: the same vocabulary, and the same cuts in a text.

    Not the file: the same tokenizer is stored in several formats.
    """
    return digest({"vocabulary": tokenizer.get_vocab(), "probe": tokenizer(_PROBE)["input_ids"]})


def prepare_shards(
    data: DataConfig, folder: Path, tokenizer: Any, say: Callable[[str], None] = lambda _: None
) -> ShardReader:
    """The shards of a run: those in ``folder`` if they fit, else made from the sources.

    Args:
        data: the sources.
        folder: of the shards.
        tokenizer: the teacher's.
        say: shows progress.

    Raises:
        AttnEditError: if there is nothing to read, or the folder holds other text or other tokens.
    """
    expected = tokenizer_hash(tokenizer)
    request = None
    if data.sources:
        described = [describe_source(s, f"data.sources.{i}") for i, s in enumerate(data.sources)]
        request = digest({"sources": described, "tokenizer": expected})
    if not (folder / MANIFEST).is_file():
        if not data.sources:
            fix = "name at least one source, or a data.shards folder that holds a manifest.json"
            raise AttnEditError("data.sources", "empty", fix)
        _write(data.sources, described, folder, tokenizer, request, say)
    reader = ShardReader(folder)
    found = reader.manifest.get("tokenizer")
    if found != expected:
        fix = "tokenise again with this teacher's tokenizer: the shards were made with another one"
        raise AttnEditError("data.shards", folder, fix)
    if request is not None and reader.manifest.get("request") != request:
        fix = "remove the folder or name another: it was made from other sources"
        raise AttnEditError("data.shards", folder, fix)
    return reader


def _write(
    sources: list[SourceConfig],
    described: list[dict[str, Any]],
    folder: Path,
    tokenizer: Any,
    request: str | None,
    say: Callable[[str], None],
) -> None:
    with_answers = any(source.kind in ("chat", "hub") for source in sources)
    counts = []
    with atomic_folder(folder, MANIFEST) as temporary:
        writer = ShardWriter(temporary, len(tokenizer), with_answers)
        for number, source in enumerate(sources):
            field = f"data.sources.{number}"
            before, documents = writer.tokens, len(writer.offsets)
            for ids, answers in _documents(source, field, tokenizer):
                left = (source.max_tokens or 1 << 62) - (writer.tokens - before)
                writer.add(ids[:left], None if answers is None else answers[:left])
                if len(ids) >= left:
                    break
            tokens = writer.tokens - before
            if not tokens:
                fix = "leave it out, or look at its column: it holds no text"
                raise AttnEditError(f"{field}.path", source.path, fix)
            counts.append({"tokens": tokens, "documents": len(writer.offsets) - documents})
            say(f"{field} ({source.kind} {source.path}): {tokens:,} tokens")
        about = [place | count for place, count in zip(described, counts)]
        writer.close(tokenizer=tokenizer_hash(tokenizer), request=request, sources=about)


def _documents(
    source: SourceConfig, field: str, tokenizer: Any
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Token ids and answer flags of each document of a source."""
    start = np.asarray(tokenizer("")["input_ids"], dtype=np.int64)  # a BOS, where the model has one
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts: list[str] = []

    def flush() -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for ids in _encode(tokenizer, texts):
            yield np.concatenate([start, ids, np.asarray(end, dtype=np.int64)]), None
        texts.clear()

    held = 0
    for where, item in read_source(source, field):
        if isinstance(item, list):
            yield tokenize_chat(tokenizer, item, where)
        elif item.strip():
            texts.append(item)
            held += len(item)
            if held >= _BLOCK_CHARACTERS * _BLOCKS:
                yield from flush()
                held = 0
    yield from flush()


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[np.ndarray]:
    """Token ids of whole documents; long ones go through the tokenizer in blocks of lines."""
    blocks: list[str] = []
    counts = []
    for text in texts:
        parts = list(_blocks(text))
        blocks += parts
        counts.append(len(parts))
    if not blocks:
        return
    # One call lets the tokenizer use all cores. The length warning is about a model's input.
    encoded = tokenizer(blocks, add_special_tokens=False, verbose=False)["input_ids"]
    place = 0
    for count in counts:
        pieces = encoded[place : place + count]
        yield np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])
        place += count


def _blocks(text: str) -> Iterator[str]:
    """Cuts of a text, each before a line that follows a line break, so that no word is cut."""
    start = 0
    while len(text) - start > _BLOCK_CHARACTERS:
        cut = text.find("\n", start + _BLOCK_CHARACTERS)
        while 0 <= cut < len(text) and text[cut] in "\r\n":
            cut += 1
        if cut < 0 or cut >= len(text):
            break
        yield text[start:cut]
        start = cut
    yield text[start:]
