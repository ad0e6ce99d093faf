"""What survives: resumed runs bit for bit, disks that fill up, copies in parts."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.training.small import make_pair, small_config, write_text
from training import checkpoint, loop, runs
from training.export import export
from training.parts import PartsReader
from training.progress import read_metrics, rewind_metrics
from training.repack import repack
from training.resuming import find_checkpoints, read_state
from training.runs import train
from vllm_attnedit.errors import AttnEditError


def run(folder, pair, text, stage, **sections):
    return train(small_config(folder, *pair, text, **sections), stage)


def interrupt(monkeypatch, after):
    """Ends a run in the middle of a step, as a kill would: nothing is saved."""
    steps = 0
    original = loop.Loop._step

    def step(self, *args):
        nonlocal steps
        steps += 1
        if steps > after:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(loop.Loop, "_step", step)


def weights(folder):
    reader = PartsReader(find_checkpoints(folder / "checkpoints")[-1])
    return {name: reader.load(name) for name in reader}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_resumed_run_repeats_every_bit(tmp_path, pair, text, stage, monkeypatch):
    run(tmp_path / "whole", pair, text, stage)
    with monkeypatch.context() as patched:
        interrupt(patched, after=5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", pair, text, stage)
    saved = find_checkpoints(tmp_path / "cut" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000002", "step-00000004"]
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    outcome = run(tmp_path / "cut", pair, text, stage)
    assert outcome.finished
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_random_numbers_go_on_where_they_were(tmp_path, pair, text, monkeypatch):
    original, drawn = loop.Loop._step, []

    def step(self, *arguments):
        drawn.append(torch.rand(1).item())
        return original(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_step", step)
    run(tmp_path / "whole", pair, text, "stage1")
    whole = drawn.copy()
    drawn.clear()
    run(tmp_path / "cut", pair, text, "stage1", run={"minutes": 1e-9})
    run(tmp_path / "cut", pair, text, "stage1")
    assert drawn == whole


def test_old_checkpoints_go_and_finished_runs_stay(tmp_path, pair, text, capsys):
    outcome = run(tmp_path, pair, text, "stage1", checkpoint={"every_steps": 1, "keep": 3})
    names = [path.name for path in find_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000005", "step-00000006"]
    again = run(tmp_path, pair, text, "stage1")
    assert again == outcome
    assert "6 of 6 steps are done" in capsys.readouterr().out


def test_provenance(tmp_path, pair, text):
    run(tmp_path, pair, text, "stage2")
    state = read_state(find_checkpoints(tmp_path / "checkpoints")[-1])
    assert state["tokens"] == 6 * 4 * 64
    assert state["next_sequence"] == 24
    assert state["config"]["optim.batch"] == 4
    assert {"teacher", "student", "versions", "commit", "command", "data"} <= state[
        "provenance"
    ].keys()
    assert len(state["data_hash"]) == 64
    stored = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]
    assert stored["stage"] == "stage2"
    assert stored["tokens_seen"] == state["tokens"]
    assert stored["stages"][-1]["data_hash"] == state["data_hash"]


@pytest.mark.parametrize("weights_as", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer_as", ["bf16", "none"])
def test_compact_states_travel_and_go_on(tmp_path, pair, text, weights_as, optimizer_as):
    compact = {"weights": weights_as, "optimizer": optimizer_as, "parts_mb": 0.25}
    first = tmp_path / "first"
    run(first, pair, text, "stage1", run={"minutes": 1e-9}, checkpoint=compact)
    (saved,) = find_checkpoints(first / "checkpoints")
    assert saved.name == "step-00000001"
    assert max(file.stat().st_size for file in saved.iterdir()) <= 1 << 18
    carried = shutil.copytree(saved, tmp_path / "carried")
    outcome = run(tmp_path / "second", pair, text, "stage1", checkpoint={"resume": str(carried)})
    assert outcome.finished
    rows = read_metrics(tmp_path / "second")
    assert [row["step"] for row in rows] == [2, 3, 4, 5, 6]
    run(tmp_path / "whole", pair, text, "stage1")
    expected = read_metrics(tmp_path / "whole")
    # The state was rounded, not lost: the loss goes on from where it was.
    assert rows[0]["loss"] == pytest.approx(expected[1]["loss"], rel=5e-3)
    assert rows[-1]["loss"] < expected[0]["loss"]


def test_a_full_checkpoint_is_repacked_for_travel(tmp_path, pair, text):
    run(tmp_path / "first", pair, text, "stage2", run={"minutes": 1e-9})
    (full,) = find_checkpoints(tmp_path / "first" / "checkpoints")
    before, state = PartsReader(full), read_state(full)

    def packed(**how):
        config = small_config(tmp_path / "first", *pair, text, checkpoint=how)
        return repack(config, full)

    folder = packed(weights="bf16", optimizer="none", parts_mb=0.25)
    assert read_state(folder) == state | {"indexes": ["index-weights-0.json"]}
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert max(sizes) <= 1 << 18
    assert sum(sizes) < 0.2 * sum(file.stat().st_size for file in full.glob("*.safetensors"))
    after = PartsReader(folder)
    for name in after:
        expected = before.load(name)
        if expected.dtype == torch.float32:
            expected = expected.bfloat16()
        assert torch.equal(after.load(name), expected)
    # Without rounding, nothing is lost: the run goes on bit for bit.
    folder = packed(parts_mb=0.25)
    options = {"resume": str(folder), "every_steps": 100}
    run(tmp_path / "second", pair, text, "stage2", checkpoint=options)
    run(tmp_path / "whole", pair, text, "stage2")
    assert read_metrics(tmp_path / "second") == read_metrics(tmp_path / "whole")[1:]


def test_lost_moments_warm_up_again(tmp_path, pair, text):
    run(
        tmp_path, pair, text, "stage1",
        run={"minutes": 1e-9}, optim={"warmup": 0.5}, checkpoint={"optimizer": "none"},
    )  # fmt: skip
    for _ in range(2):
        run(
            tmp_path, pair, text, "stage1",
            run={"minutes": 1e-9}, optim={"warmup": 0.5}, checkpoint={"optimizer": "none"},
        )  # fmt: skip
    rates = [row["lr"] for row in read_metrics(tmp_path)]
    assert len(rates) == 3
    assert rates[2] == pytest.approx(rates[0])  # risen anew, where 3/4 of the peak was due


def test_a_copy_without_its_moments_is_refused(tmp_path, pair, text):
    run(tmp_path, pair, text, "stage1", run={"minutes": 1e-9})
    (full,) = find_checkpoints(tmp_path / "checkpoints")
    (full / "index-optimizer-0.json").unlink()
    config = small_config(tmp_path, *pair, text)
    for use in (
        lambda: train(config, "stage1"),
        lambda: export(config, full),
        lambda: repack(config, full),
    ):
        with pytest.raises(AttnEditError, match=r"index-optimizer-0\.json: missing: copy it"):
            use()


def test_a_run_does_not_go_back_behind_its_newest_checkpoint(tmp_path, pair, text):
    run(tmp_path, pair, text, "stage1", checkpoint={"every_steps": 2, "keep": 5})
    first, *_, last = find_checkpoints(tmp_path / "checkpoints")
    back: dict[str, Any] = {"resume": str(first)}
    with pytest.raises(AttnEditError, match=rf"checkpoint\.resume: .*{first.name}: .*{last.name}"):
        run(tmp_path, pair, text, "stage1", checkpoint=back)
    for later in find_checkpoints(tmp_path / "checkpoints")[1:]:
        shutil.rmtree(later)
    back |= {"every_steps": 2, "keep": 5}
    assert run(tmp_path, pair, text, "stage1", checkpoint=back).finished
    # The same command once more, as a queue would give it.
    assert run(tmp_path, pair, text, "stage1", checkpoint=back).step == 6


def test_what_a_killed_save_left_goes_with_the_next(tmp_path, pair, text):
    left = tmp_path / "checkpoints" / ".step-00000003.partial"
    left.mkdir(parents=True)
    run(tmp_path, pair, text, "stage1", run={"minutes": 1e-9})
    assert not left.exists()


def test_sigterm_while_the_last_checkpoint_is_saved(tmp_path, pair, text, monkeypatch):
    """It is saved to its end, and the run ends as it would have."""
    publish = checkpoint.publish

    def slowly(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        publish(folder)

    monkeypatch.setattr(checkpoint, "publish", slowly)
    outcome = run(tmp_path, pair, text, "stage1", run={"minutes": 1e-9})
    assert outcome.step == 1
    assert outcome.checkpoint.is_dir()


def test_minutes_count_from_the_beginning_of_the_run(tmp_path, pair, text, monkeypatch):
    load = runs.load_teacher

    def slowly(*args, **kwargs):
        time.sleep(1)
        return load(*args, **kwargs)

    monkeypatch.setattr(runs, "load_teacher", slowly)
    assert run(tmp_path, pair, text, "stage1", run={"minutes": 1 / 60}).step == 1


def test_a_changed_option_is_refused_before_models_are_loaded(tmp_path, pair, text, monkeypatch):
    run(tmp_path, pair, text, "stage1", run={"minutes": 1e-9})
    monkeypatch.setattr(runs, "load_teacher", None)
    with pytest.raises(AttnEditError, match=r"stage1\.lr"):
        run(tmp_path, pair, text, "stage1", stage1={"lr": 1e-4})


def test_a_teacher_of_another_attention_is_another(tmp_path, pair, text):
    """An edit of either is the same but for attention, which it has of its own."""
    teacher, student = pair
    run(tmp_path / "run", pair, text, "stage2", run={"minutes": 1e-9})
    other = shutil.copytree(teacher, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AttnEditError, match=r"teacher: .*other weights"):
        run(tmp_path / "run", (other, student), text, "stage2")
    cache = {"top_k": 8, "cache": str(tmp_path / "cache")}
    run(tmp_path / "one", pair, text, "stage2", stage2=cache)
    with pytest.raises(AttnEditError, match=r"stage2\.cache: .*another teacher_weights"):
        run(tmp_path / "two", (other, student), text, "stage2", stage2=cache)
    with pytest.raises(AttnEditError, match=r"stage2\.cache: .*another fp32_logits"):
        run(tmp_path / "two", pair, text, "stage2", stage2=cache | {"fp32_logits": True})
    with pytest.raises(AttnEditError, match=r"stage2\.cache: .*cosine"):
        run(tmp_path / "two", pair, text, "stage2", stage2=cache | {"cosine_weight": 0.1})


@contextmanager
def largest_file(size):
    """The system refuses to write beyond so many bytes of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("failing", ["weights", "state"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, pair, text, monkeypatch, failing):
    def publish(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    run(tmp_path, pair, text, "stage1", run={"minutes": 1e-9})
    with monkeypatch.context() as patched, ExitStack() as stack:
        if failing == "state":
            patched.setattr("training.checkpoint.publish", publish)
        else:
            stack.enter_context(largest_file(1 << 18))
        with pytest.raises(AttnEditError, match=r"(No space left|File too large).*free") as raised:
            run(tmp_path, pair, text, "stage1")
    assert "\n" not in str(raised.value)
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert left == ["step-00000001"]
    assert run(tmp_path, pair, text, "stage1").finished
    run(tmp_path / "whole", pair, text, "stage1")
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "whole")


def test_a_disk_too_full_for_progress_is_one_line(tmp_path, pair, text, monkeypatch):
    def report(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.progress.Progress.report", report)
    with pytest.raises(AttnEditError, match="No space left"):
        run(tmp_path, pair, text, "stage1")


def test_a_disk_too_full_for_shards_is_one_line(tmp_path, pair, text):
    with largest_file(1 << 14), pytest.raises(AttnEditError, match=r"shards: File too large"):
        run(tmp_path, pair, text, "stage1")
    assert not (tmp_path / "shards").exists()


def test_what_changed_is_refused_by_name(tmp_path, pair, text):
    run(tmp_path, pair, text, "stage1", run={"minutes": 1e-9})
    with pytest.raises(AttnEditError, match=r"stage1\.lr.*0\.001.*set it back"):
        run(tmp_path, pair, text, "stage1", stage1={"lr": 1e-4})
    with pytest.raises(AttnEditError, match=r"optim\.tokens"):
        run(tmp_path, pair, text, "stage1", optim={"tokens": 1e5})
    with pytest.raises(AttnEditError, match="stage1"):
        run(tmp_path, pair, text, "stage2")
    with pytest.raises(AttnEditError, match=r"checkpoint\.resume"):
        run(tmp_path, pair, text, "stage1", checkpoint={"resume": "never"})
    other = write_text(tmp_path / "other.txt", seed=5)
    with pytest.raises(AttnEditError, match="data"):
        run(tmp_path, pair, other, "stage1", data={"shards": str(tmp_path / "others")})
    with pytest.raises(AttnEditError, match="nowhere"):
        run(tmp_path / "new", pair, text, "stage1", checkpoint={"resume": "nowhere"})
    # How and where are free.
    changed = {"optim": {"micro_batch": 4}, "log": {"every": 1}, "checkpoint": {"keep": 5}}
    assert run(tmp_path, pair, text, "stage1", **changed).finished


def test_another_teacher_or_student_is_refused(tmp_path, pair, text):
    """Names and shapes are the same, what is computed is not."""
    teacher, student = pair
    nameless = shutil.copytree(student, tmp_path / "nameless")
    about = json.loads((nameless / "config.json").read_text())
    del about["provenance"]["teacher_fingerprint"]
    (nameless / "config.json").write_text(json.dumps(about))
    folder = tmp_path / "run"
    run(folder, (teacher, nameless), text, "stage1", run={"minutes": 1e-9})
    other, _ = make_pair(tmp_path / "other", seed=1)
    with pytest.raises(AttnEditError, match=r"teacher: .*other weights"):
        run(folder, (other, nameless), text, "stage1")
    about["attention_edit"]["sliding_window"] = 16
    (nameless / "config.json").write_text(json.dumps(about))
    with pytest.raises(AttnEditError, match=r"student sliding_window: 16: .* has 8"):
        run(folder, (teacher, nameless), text, "stage1")
    assert run(folder, (teacher, student), text, "stage1").finished


def test_metrics_forget_what_a_kill_left_unfinished(tmp_path):
    rows = [json.dumps({"step": i}) for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    rewind_metrics(tmp_path, 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_loss_that_is_not_finite_stops_and_names_step_and_layer(
    tmp_path, pair, text, stage, monkeypatch
):
    original = loop.Loop._step

    def poisoned(self, step, batches):
        if step == 3:
            name = next(n for n in self._stage.trained if "layers.2." in n)
            with torch.no_grad():
                self._stage.trained[name].fill_(float("nan"))
        return original(self, step, batches)

    monkeypatch.setattr(loop.Loop, "_step", poisoned)
    with pytest.raises(AttnEditError, match=r"step 4.*layer 2.*step-00000002"):
        run(tmp_path, pair, text, stage)
    monkeypatch.undo()
    assert run(tmp_path, pair, text, stage).finished
    assert np.isfinite([row["loss"] for row in read_metrics(tmp_path)]).all()


def test_curves_and_tensorboard_are_drawn(tmp_path, pair, text):
    run(tmp_path, pair, text, "stage1", log={"curves": True, "tensorboard": True})
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").glob("events*"))
