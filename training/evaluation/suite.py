"""Measures every model on everything that the configuration asks for, and writes the report."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from training.config import Config
from training.evaluation.intervals import Estimate
from training.evaluation.passkey import passkey_prompts, run_passkey
from training.evaluation.report import write_report
from training.evaluation.rows import Measurement, Table
from training.evaluation.tasks import check_tasks, run_tasks
from training.evaluation.text import agreement, perplexity
from training.evaluation.variants import TEACHER, Variant, make_variants, unpack_edits
from training.layer_choice import read_windows
from training.models import load_tokenizer
from training.parallel import Devices
from training.progress import say
from vllm_attnedit.accounting import kv_bytes_per_token
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.hf import AttnEditForCausalLM


def run_suite(config: Config) -> Path:
    """Measure, report, and return the folder of the report.

    Raises:
        AttnEditError: for everything a user can mend, before the first measurement where possible.
    """
    devices = Devices(replace(config.run, sharding="none"), config.seed)
    if devices.ranks > 1:
        raise AttnEditError("evaluate", f"{devices.ranks} processes", "start it as one process")
    tokenizer = load_tokenizer(config.teacher)
    suite = Suite(config, devices, tokenizer)
    suite.check()
    unpack_edits(config)
    variants = make_variants(config, devices.device, devices.compute_dtype)
    teacher = variants[0].load()
    for variant in variants:
        began = time.monotonic()
        model = teacher if variant.name == TEACHER else variant.load()
        suite.measure(variant, model, teacher)
        say(f"{variant.name}: measured in {time.monotonic() - began:.0f} s")
        del model
        gc.collect()
        if devices.device.type == "cuda":
            torch.cuda.empty_cache()
    folder = Path(config.evaluate.report or Path(config.output) / "evaluation")
    write_report(folder, suite.table, variants, asdict(config.evaluate))
    say(f"wrote {folder}/report.md")
    return folder


class Suite:
    """All measurements of an evaluation.

    Args:
        config: of the evaluation.
        devices: of this process.
        tokenizer: the teacher's.
    """

    def __init__(self, config: Config, devices: Devices, tokenizer: Any) -> None:
        self._all, self._config, self._devices = config, config.evaluate, devices
        self._tokenizer = tokenizer
        self.table = Table(config.evaluate.label)

    def check(self) -> None:
        """Refuse what cannot be measured before hours are spent on the rest."""
        for name in self._config.models:
            if name in (TEACHER, *self._config.baselines):
                fix = f"call it something else: {name} is another model of the same table"
                raise AttnEditError("evaluate.models", name, fix)
        check_tasks(self._config.tasks, self._config.task_files, self._config.fewshot)
        for length in self._config.passkey.lengths:
            passkey_prompts(self._tokenizer, length, 0.0, 1)
        for name, path in self._config.perplexity.items():
            shortest = min([*self._config.lengths, self._config.agreement_length])
            read_windows(path, f"evaluate.perplexity.{name}", self._tokenizer, shortest, 1)

    def measure(
        self, variant: Variant, model: AttnEditForCausalLM, teacher: AttnEditForCausalLM
    ) -> None:
        """Measure one model."""
        bytes_per_token = kv_bytes_per_token(model.config)
        cost = Estimate(bytes_per_token, None, None, 1)
        self._add(variant, Measurement("KV cache", "bytes a token", "B", cost, (), False))
        with self._devices.autocast():
            for measurement in self._text(variant, model, teacher):
                self._add(variant, measurement)
            for measurement in self._passkey(model):
                self._add(variant, measurement)
        for shots in self._config.fewshot if self._config.tasks else []:
            found = list(self._tasks(model, shots))
            for measurement in found:
                self._add(variant, measurement)
            self.table.add_task_mean(variant, shots, found)

    def _add(self, variant: Variant, measurement: Measurement) -> None:
        self.table.add(variant, measurement)
        estimate = measurement.estimate
        spread = "" if estimate.half_width is None else f" ± {estimate.half_width:.4g}"
        say(f"{variant.name}: {measurement.what} {measurement.metric} {estimate.value:.5g}{spread}")

    def _text(
        self, variant: Variant, model: AttnEditForCausalLM, teacher: AttnEditForCausalLM
    ) -> Iterator[Measurement]:
        longest = int(teacher.config.max_position_embeddings)
        for name, path in self._config.perplexity.items():
            for length in self._config.lengths:
                ids = self._windows(name, path, length) if length <= longest else None
                if ids is not None:
                    estimate = perplexity(model, ids)
                    what = f"perplexity {name} L{length}"
                    yield Measurement(what, "perplexity", "perplexity", estimate, (), False)
                elif variant.name == TEACHER:
                    reader = "the teacher reads" if length > longest else "the text"
                    say(f"perplexity {name} L{length}: left out, longer than {reader}")
            if variant.name == TEACHER:
                continue
            length = min(self._config.agreement_length, longest)
            ids = self._windows(name, path, length)
            if ids is not None:
                what, (found, above) = f"{name} L{length}", agreement(model, teacher, ids)
                yield Measurement(f"agreement {what}", "top1", "share", found["top1"])
                yield Measurement(f"agreement {what}", "kl", "nat", found["kl"], (), False)
                for (first, last), estimate in above.items():
                    seen = f"{what} after {first}-{last} tokens"
                    yield Measurement(seen, "loss above the teacher's", "nat", estimate, (), False)

    def _windows(self, name: str, path: str, length: int) -> torch.Tensor | None:
        """The windows of a text, or nothing if it is shorter than one."""
        field = f"evaluate.perplexity.{name}"
        try:
            return read_windows(path, field, self._tokenizer, length, self._config.max_windows)
        except AttnEditError:
            return None

    def _passkey(self, model: AttnEditForCausalLM) -> Iterator[Measurement]:
        found = run_passkey(model, self._tokenizer, self._config.passkey)
        for (length, depth), estimate in found.items():
            what = f"passkey L{length} depth{round(100 * depth)}%"
            yield Measurement(what, "found", "share", estimate)

    def _tasks(self, model: AttnEditForCausalLM, shots: int) -> Iterator[Measurement]:
        scores = run_tasks(
            model,
            self._tokenizer,
            self._config.tasks,
            folder=self._config.task_files,
            shots=shots,
            limit=self._config.limit,
            batch=self._config.batch,
            seed=self._all.seed,
        )
        for (task, metric), score in scores.items():
            unit = "share" if metric.startswith("acc") else metric
            yield Measurement(f"{task} {shots}-shot", metric, unit, score.estimate, score.samples)
