"""Stage 1, held to problems of a single layer that are built by hand.

The hand-built problem knows nothing of hooks: it runs the teacher once with all hidden states kept,
takes one layer's normed input and its own attention output, and lets autograd do the rest.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.training.small import make_pair, small_config
from training import attention
from training.data import BatchStream, PackedSequences, prepare_shards
from training.layerwise import LayerwiseStage, relative_error
from training.models import Trunk, load_teacher, load_tokenizer, student_config
from training.parallel import Devices
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.hf import AttnEditForCausalLM


def make_stage(folder, *material, **sections):
    config = small_config(folder, *material, **sections)
    teacher, student, _ = material
    devices = Devices(config.run, config.seed)
    loaded = load_teacher(str(teacher), dtype=torch.float32, attention=attention.register())
    store = SafetensorsStore(student)
    stage = LayerwiseStage(
        Trunk(loaded), student_config(str(student)), store, config, devices, "sdpa"
    )
    reader = prepare_shards(config.data, folder / "shards", load_tokenizer(str(teacher)))
    data = PackedSequences(reader, config.data.sequence_length, config.seed)
    stream = BatchStream(data, batch=config.optim.batch, micro=config.optim.micro_batch)
    return stage, stream


def single_layer_problem(teacher, student, layer, batches):
    """Loss and gradients of one layer, document by document, from unpacked inputs."""
    plain = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    edited = AttnEditForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    block, attn = plain.model.layers[layer], edited.model.layers[layer].self_attn
    kept: dict[str, torch.Tensor] = {}

    def keep(_module, _args, kwargs, output):
        kept.update(x=kwargs["hidden_states"].detach(), y=output[0].detach())

    handle = block.self_attn.register_forward_hook(keep, with_kwargs=True)
    losses = []
    for batch in batches:
        for ids, documents in zip(batch.input_ids, batch.documents):
            for document in documents.unique():
                part = ids[documents == document][None]
                with torch.no_grad():
                    plain(part)
                # All positions from 0, the library's own masks: nothing of the packing.
                positions = torch.arange(part.shape[1])[None]
                kind = edited.config.edit.layer_types[layer]
                rotary = edited.model.rotary_emb["latent" if "latent" in kind else "gated"]
                length = part.shape[1]
                behind = torch.arange(length)[:, None] - torch.arange(length)
                seen = behind >= 0
                if "sliding" in kind:
                    seen &= behind < edited.config.sliding_window
                answer, _ = attn(
                    kept["x"],
                    position_embeddings=rotary(kept["x"], positions),
                    attention_mask=seen[None, None],
                )
                error = (answer - kept["y"]).square().sum(-1) / kept["y"].square().sum(-1)
                losses.append(error.flatten())
    handle.remove()
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in attn.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "target", "init"),
    [
        ("llama", "gateswa", "inherit"),
        ("llama", "gateswa", "random"),
        ("qwen2", "mla", "inherit"),
        ("qwen3", "gateswa", "random"),
        ("qwen3", "mla", "random"),
        ("qwen3_moe", "gateswa", "inherit"),
    ],
    ids=lambda value: str(value),
)
def test_gradients_equal_single_layer_problems(tmp_path, text, family, target, init):
    teacher, student = make_pair(tmp_path, family, target, init)
    stage, stream = make_stage(tmp_path, teacher, student, text)
    batches = stream.step(0)
    result = stage.run(batches)
    assert result.layers is not None
    for layer in range(4):
        loss, gradients = single_layer_problem(teacher, student, layer, batches)
        assert result.layers[layer].item() == pytest.approx(loss, rel=1e-4)
        named = dict(stage.modules[layer].named_parameters())
        assert gradients.keys() == named.keys()
        for name, expected in gradients.items():
            found = named[name].grad
            assert found is not None
            scale = expected.abs().max().item()
            torch.testing.assert_close(found, expected, atol=1e-4 * scale + 1e-7, rtol=1e-3)


def gradients_of(stage, layer):
    return {n: p.grad.clone() for n, p in stage.modules[layer].named_parameters()}


def test_no_gradient_crosses_layers(tmp_path, pair, text):
    stage, stream = make_stage(tmp_path, *pair, text)
    batches = stream.step(0)
    stage.run(batches)
    before = [gradients_of(stage, layer) for layer in range(4)]
    for parameter in stage.trained.values():
        parameter.grad = None
    with torch.no_grad():
        for parameter in stage.modules[1].parameters():
            parameter.mul_(1.5)
    stage.run(batches)
    for layer in range(4):
        after = gradients_of(stage, layer)
        same = all(torch.equal(before[layer][name], after[name]) for name in after)
        assert same == (layer != 1)
    assert all(p.grad is None for p in stage._teacher.parameters())


def test_clipping_one_layer_leaves_the_others(tmp_path, pair, text):
    stage, stream = make_stage(tmp_path, *pair, text)
    stage.run(stream.step(0))
    with torch.no_grad():
        for parameter in stage.modules[2].parameters():
            parameter.grad.mul_(1e6)
    before = [gradients_of(stage, layer) for layer in range(4)]
    norm = stage.clip(1e3)
    assert norm.item() > 1e3
    for layer in (0, 1, 3):
        after = gradients_of(stage, layer)
        assert all(torch.equal(before[layer][name], after[name]) for name in after)
    total = torch.stack([g.norm() for g in gradients_of(stage, 2).values()]).norm()
    assert total.item() == pytest.approx(1e3, rel=1e-3)


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_every_layers_loss_falls(tmp_path, text, target):
    teacher, student = make_pair(tmp_path, "llama", target, "random")
    stage, stream = make_stage(tmp_path, teacher, student, text)
    optimizer = torch.optim.AdamW(stage.trained.values(), lr=3e-3)
    batches = stream.step(0)
    first = stage.run(batches).layers
    for _ in range(12):
        optimizer.step()
        optimizer.zero_grad()
        last = stage.run(batches).layers
    assert (last < 0.9 * first).all()


class Kept:
    """What autograd keeps for a backward pass, in a box that can be watched."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_one_layers_activations_are_alive_at_a_time(tmp_path, pair, text):
    stage, stream = make_stage(tmp_path, *pair, text)
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    before, within = [], []

    def pack(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    for module in stage.modules.values():
        module.register_forward_pre_hook(lambda *_: before.append(len(alive)))
        module.register_forward_hook(lambda *_: within.append(len(alive)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        stage.run(stream.step(0)[:1])
    assert before == [0, 0, 0, 0]
    assert min(within) > 0


def test_accumulation_does_not_change_the_step(tmp_path, pair, text):
    found = []
    for micro in (1, 4):
        folder = tmp_path / str(micro)
        folder.mkdir()
        stage, stream = make_stage(folder, *pair, text, optim={"micro_batch": micro})
        loss = stage.run(stream.step(0)).loss.item()
        found.append((loss, gradients_of(stage, 0)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-5, rtol=1e-3)


def test_some_layers_alone(tmp_path, pair, text):
    stage, stream = make_stage(tmp_path, *pair, text, stage1={"layers": [3, 1]})
    result = stage.run(stream.step(0))
    assert list(stage.layers) == [1, 3]
    assert result.layers is not None
    assert len(result.layers) == 2
    assert {name.split(".")[2] for name in stage.trained} == {"1", "3"}
    with pytest.raises(AttnEditError, match=r"stage1\.layers"):
        make_stage(tmp_path, *pair, text, stage1={"layers": [4]})


def test_a_process_without_a_layer_is_refused(tmp_path, pair, text):
    teacher, student = pair
    config = small_config(tmp_path, *pair, text, stage1={"split": "layers"})
    devices = Devices(config.run, config.seed)
    devices.ranks = 5
    loaded = load_teacher(str(teacher), dtype=torch.float32, attention=attention.register())
    arguments = (student_config(str(student)), SafetensorsStore(student), config, devices, "sdpa")
    with pytest.raises(AttnEditError, match=r"stage1\.split: layers, 5 processes: .*at most 4"):
        LayerwiseStage(Trunk(loaded), *arguments)


def test_blame_names_the_layer(tmp_path, pair, text):
    stage, stream = make_stage(tmp_path, *pair, text)
    with torch.no_grad():
        next(stage.modules[2].parameters()).fill_(float("nan"))
    batches = stream.step(0)
    assert stage.blame(batches, stage.run(batches)) == "layer 2"


def test_relative_error_of_a_silent_target_is_finite():
    output = torch.ones(1, 2, 4, requires_grad=True)
    error = relative_error(output, torch.tensor([[[0.0] * 4, [2.0, 0, 0, 0]]]))
    error.sum().backward()
    assert torch.isfinite(error).all()
    assert error[0, 1].item() == pytest.approx(1.0)
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()
