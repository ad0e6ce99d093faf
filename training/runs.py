"""Puts a training run together: checks first, then data, then models, then the loop."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from training import attention
from training.checkpoint import Checkpoints
from training.config import Config
from training.data import BatchStream, PackedSequences, ShardReader, prepare_shards
from training.distill import DistillStage
from training.export import check_export, export
from training.files import disk_errors
from training.layerwise import LayerwiseStage
from training.loop import Loop, Outcome
from training.models import (
    Trunk,
    load_student,
    load_teacher,
    select_trained,
    student_folder,
    unpack_student,
)
from training.pairing import check_models, check_tokenizers
from training.parallel import Devices
from training.progress import say as print_line
from training.stage import Stage
from training.targets import TopKCache
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.provenance import git_commit, package_versions
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.errors import AttnEditError


def train(config: Config, stage_name: str) -> Outcome:
    """Run Stage 1 or Stage 2 to its end, and export the result.

    Args:
        config: of the run.
        stage_name: ``stage1`` or ``stage2``.

    Raises:
        AttnEditError: for everything a user can mend.
    """
    began = time.monotonic()
    check_export(config, stage_name)
    _check_cache(config, stage_name)
    devices = Devices(config.run, config.seed)
    _check_batch(config, devices.ranks, stage_name)

    def say(line: str) -> None:
        if devices.main:
            print_line(line)

    output = Path(config.output)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    config.student = devices.main_first(
        lambda: unpack_student(config.teacher, config.student, output)
    )
    student, models = check_models(config)
    tokenizer = check_tokenizers(config)
    folder = Path(config.data.shards or output / "shards")
    reader = devices.main_first(lambda: prepare_shards(config.data, folder, tokenizer, say))
    if config.data.loss_on == "answers" and not reader.manifest["answer_tokens"]:
        fix = "set it to all: the chat template of this tokenizer leaves no answer as it is"
        raise AttnEditError("data.loss_on", "answers", fix)
    data = PackedSequences(reader, config.data.sequence_length, config.seed, config.optim.batch)
    say(f"data: {reader.tokens:,} tokens, {data.per_pass:,} sequences a pass")

    about = provenance(config, devices, reader)
    checkpoints = Checkpoints(config, devices, reader.hash, about, models)
    checkpoints.choose(stage_name)  # refuses before models are loaded
    stage = _make_stage(config, stage_name, student, models["teacher_weights"], devices, reader)
    trained = sum(parameter.numel() for parameter in stage.trained.values())
    say(f"{stage_name} on {devices.ranks} x {devices.device}: {trained:,} trained parameters")
    stream = BatchStream(
        data,
        batch=config.optim.batch,
        micro=config.optim.micro_batch,
        rank=0 if stage.split_layers else devices.rank,
        ranks=1 if stage.split_layers else devices.ranks,
        answers_only=config.data.loss_on == "answers",
        chunk=config.stage2.chunk_tokens if stage_name == "stage2" else 1,
        pin=devices.device.type == "cuda",
    )
    outcome = Loop(stage, config, devices, stream, checkpoints, say, began).run()
    if not outcome.finished:
        say(
            f"stopped after step {outcome.step}; the same command resumes from {outcome.checkpoint}"
        )
        return outcome
    if devices.main:
        for path in export(config, outcome.checkpoint):
            say(f"wrote {path}")
    devices.barrier()
    return outcome


def provenance(config: Config, devices: Devices, reader: ShardReader) -> dict[str, Any]:
    """What a checkpoint says of its origin."""
    return {
        "teacher": config.teacher,
        "student": config.student,
        "command": " ".join(["python -m training", *sys.argv[1:]]),
        "commit": git_commit(),
        "versions": package_versions(),
        "device": devices.name,
        "data": reader.manifest.get("sources"),
    }


def _check_batch(config: Config, ranks: int, stage: str) -> None:
    shared = 1 if stage == "stage1" and config.stage1.split == "layers" else ranks
    group = config.optim.micro_batch * shared
    if config.optim.batch % group:
        fix = (
            f"give a multiple of {group}: micro_batch {config.optim.micro_batch} x {shared} devices"
        )
        raise AttnEditError("optim.batch", config.optim.batch, fix)


def _check_cache(config: Config, stage: str) -> None:
    if stage == "stage2" and config.stage2.cache and config.stage2.top_k is None:
        fix = "set stage2.top_k: only the likeliest tokens are kept on disk"
        raise AttnEditError("stage2.cache", config.stage2.cache, fix)
    if stage == "stage2" and config.stage2.cache and config.stage2.cosine_weight:
        fix = "leave it out: the cosine term needs the teacher's hidden states, which are not kept"
        raise AttnEditError("stage2.cache", config.stage2.cache, fix)


def _make_stage(
    config: Config,
    name: str,
    student: AttnEditConfig,
    fingerprint: str,
    devices: Devices,
    reader: ShardReader,
) -> Stage:
    form = attention.choose(config.run.attention, devices.device, config.run.precision)
    packed = attention.register()
    loaded = load_teacher(config.teacher, dtype=devices.compute_dtype, attention=packed)
    teacher = Trunk(loaded.to(devices.device))
    folder = student_folder(config.student)
    if name == "stage1":
        devices.shard(teacher, teacher.layers)
        store = SafetensorsStore(folder)
        return LayerwiseStage(teacher, student, store, config, devices, form)
    # Weights that are stored in float32 must not be rounded on their way to float32 masters.
    store = SafetensorsStore(folder)
    stored = {info.dtype for info in store.tensors.values()}
    store.close()
    wide = torch.float32 if torch.float32 in stored else devices.compute_dtype
    model = load_student(str(folder), dtype=wide, attention=packed)
    # Here already, so that the frozen rest is not moved as float32.
    select_trained(model, config.stage2.trainable == "all", devices.compute_dtype)
    cache = None
    if config.stage2.cache:
        identity = {
            "teacher_weights": fingerprint,
            "data": reader.hash,
            "order": config.seed,
            "length": config.data.sequence_length,
            "k": config.stage2.top_k,
            "precision": config.run.precision,
            "fp32_logits": config.stage2.fp32_logits,
        }
        cache_folder = Path(config.stage2.cache)
        cache = devices.main_first(lambda: TopKCache(cache_folder, identity))
    return DistillStage(teacher, Trunk(model.to(devices.device)), config, devices, form, cache)
