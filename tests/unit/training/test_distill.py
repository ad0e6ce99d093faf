"""Stage 2, held to plain losses on unpacked documents, and to itself under other settings."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.unit.training.small import make_pair, small_config, write_chats
from training import attention
from training.data import BatchStream, PackedSequences, prepare_shards
from training.distill import DistillStage, cosine_distance
from training.models import Trunk, load_student, load_teacher, load_tokenizer
from training.parallel import Devices
from training.parts import PartsReader
from training.runs import train
from training.targets import TopKCache
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.hf import AttnEditForCausalLM


def make_stage(folder, *material, cache=None, **sections):
    config = small_config(folder, *material, **sections)
    teacher, student, _ = material
    devices = Devices(config.run, config.seed)
    packed = attention.register()
    dtype = devices.compute_dtype
    loaded = Trunk(load_teacher(str(teacher), dtype=dtype, attention=packed))
    mine = Trunk(load_student(str(student), dtype=dtype, attention=packed))
    stage = DistillStage(loaded, mine, config, devices, "sdpa", cache)
    reader = prepare_shards(config.data, folder / "shards", load_tokenizer(str(teacher)))
    data = PackedSequences(reader, config.data.sequence_length, config.seed)
    stream = BatchStream(
        data,
        batch=config.optim.batch,
        micro=config.optim.micro_batch,
        answers_only=config.data.loss_on == "answers",
        chunk=config.stage2.chunk_tokens,
    )
    return stage, stream


def gradients(stage):
    return {name: p.grad.clone() for name, p in stage.trained.items()}


def assert_same(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected[name], atol=tolerance * scale + 1e-8, rtol=1e-3, msg=name
        )


def plain_loss(teacher, student, batches, weight=0.0, answers=None):
    """The loss by the library's models and plain tensors, one document at a time."""
    theirs = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    mine = AttnEditForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    total, count, distances = torch.zeros(()), 0, []
    for batch in batches:
        for ids, documents in zip(batch.input_ids, batch.documents):
            for document in documents.unique():
                part = ids[documents == document][None]
                with torch.no_grad():
                    target = theirs(part, output_hidden_states=True)
                # Hidden states before the final norm, which transformers' last entry is behind.
                states: list[torch.Tensor] = []

                def keep(_module, _args, output, states=states):
                    states.append(output)

                layers = (*mine.model.layers, *theirs.model.layers)
                hooks = [layer.register_forward_hook(keep) for layer in layers]
                output = mine(part)
                with torch.no_grad():
                    theirs(part)
                for hook in hooks:
                    hook.remove()
                half = len(states) // 2
                for a, b in zip(states[:half], states[half:]):
                    distances.append(1 - functional.cosine_similarity(a, b, dim=-1).flatten())
                logp = torch.log_softmax(target.logits[0, :-1], -1)
                logq = torch.log_softmax(output.logits[0, :-1], -1)
                kl = (logp.exp() * (logp - logq)).sum(-1)
                total, count = total + kl.sum(), count + len(kl)
    loss = total / count + weight * torch.cat(distances).mean()
    loss.backward()
    return loss.item(), {
        n: p.grad for n, p in mine.named_parameters() if p.grad is not None and "self_attn" in n
    }


@pytest.mark.parametrize(
    ("family", "target"),
    [("llama", "gateswa"), ("qwen2", "gateswa"), ("qwen3", "mla"), ("qwen3_moe", "gateswa")],
)
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_loss_and_gradients_equal_the_plain_ones(tmp_path, text, family, target, weight):
    if weight and family != "llama":
        target = "mla" if target == "gateswa" else "gateswa"  # other pairs, not more of them
    teacher, student = make_pair(tmp_path, family, target)
    stage, stream = make_stage(
        tmp_path, teacher, student, text, stage2={"cosine_weight": weight, "chunk_tokens": 48}
    )
    batches = stream.step(0)
    result = stage.run(batches)
    loss, expected = plain_loss(teacher, student, batches, weight)
    assert result.loss.item() == pytest.approx(loss, rel=2e-5)
    assert_same(gradients(stage), expected)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(tmp_path, text):
    teacher, _ = make_pair(tmp_path)
    from vllm_attnedit.edit import EditPlan, edit_checkpoint

    same = tmp_path / "same"
    edit_checkpoint(
        teacher, same, EditPlan(target="gateswa", full_layers=(0, 1, 2, 3), gate="none")
    )
    stage, stream = make_stage(tmp_path, teacher, same, text, stage2={"cosine_weight": 0.1})
    result = stage.run(stream.step(0))
    assert abs(result.loss.item()) < 1e-5
    assert result.metrics["agreement"].item() == 1.0
    assert result.metrics["cosine"].item() == pytest.approx(0, abs=1e-6)
    assert max(g.abs().max().item() for g in gradients(stage).values()) < 1e-4


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"micro_batch": 1}},
        {"optim": {"micro_batch": 4}},
        {"run": {"gradient_checkpointing": True}},
        {"stage2": {"chunk_tokens": 7}},
        {"stage2": {"top_k": 512, "chunk_tokens": 48}},
    ],
    ids=lambda sections: str(sections),
)
def test_how_it_is_computed_does_not_change_the_step(tmp_path, pair, text, sections):
    reference, stream = make_stage(tmp_path / "a", *pair, text)
    loss = reference.run(stream.step(0)).loss.item()
    other, stream = make_stage(tmp_path / "b", *pair, text, **sections)
    result = other.run(stream.step(0))
    # float16 log probabilities of a top-k teacher are rounded in the fourth digit.
    rounded = "top_k" in sections.get("stage2", {})
    assert result.loss.item() == pytest.approx(loss, rel=2e-3 if rounded else 1e-5)
    assert_same(gradients(other), gradients(reference), 5e-2 if rounded else 1e-4)


def test_answers_only(tmp_path, pair):
    chats = write_chats(tmp_path / "c.jsonl", 60)
    data = {
        "sources": [{"kind": "chat", "path": str(chats)}],
        "loss_on": "answers",
        "sequence_length": 64,
    }
    stage, stream = make_stage(tmp_path, *pair, chats, data=data)
    batches = stream.step(0)
    assert all(b.loss_index is not None for b in batches)
    result = stage.run(batches)
    whole, stream = make_stage(tmp_path / "all", *pair, chats, data=data | {"loss_on": "all"})
    assert sum(b.loss_tokens for b in stream.step(0)) > sum(b.loss_tokens for b in batches)
    assert result.loss.item() != pytest.approx(whole.run(stream.step(0)).loss.item(), rel=1e-3)


def test_everything_can_train_with_its_own_rate(tmp_path, pair, text):
    stage, stream = make_stage(tmp_path, *pair, text, stage2={"trainable": "all"})
    stage.run(stream.step(0))
    attn, rest = stage.groups
    assert (attn.name, rest.name) == ("attention", "rest")
    assert (attn.lr, rest.lr) == (3e-4, 1e-5)
    assert all(".self_attn." in name for name in attn.parameters)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= rest.parameters.keys()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.trained.values())
    alone, stream = make_stage(tmp_path / "b", *pair, text)
    alone.run(stream.step(0))
    shared = {name: g for name, g in gradients(stage).items() if ".self_attn." in name}
    assert_same(shared, gradients(alone))


def test_bf16_trains_float32_masters(tmp_path, pair, text):
    stage, stream = make_stage(tmp_path, *pair, text, run={"precision": "bf16"})
    exact, _ = make_stage(tmp_path / "b", *pair, text)
    batches = stream.step(0)
    assert {p.dtype for p in stage.trained.values()} == {torch.float32}
    frozen = [p for p in stage.module.student.lm.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    loss = stage.run(batches).loss.item()
    assert loss == pytest.approx(exact.run(batches).loss.item(), rel=0.05)
    assert {p.grad.dtype for p in stage.trained.values()} == {torch.float32}


IDENTITY = {"teacher": "t", "data": "d", "order": 0, "length": 64, "k": 16}


def test_cached_teachers_need_no_second_pass(tmp_path, pair, text):
    cache = TopKCache(tmp_path / "cache", IDENTITY)
    options = {"stage2": {"top_k": 16, "chunk_tokens": 48}}
    first, stream = make_stage(tmp_path / "a", *pair, text, cache=cache, **options)
    batches = stream.step(0)
    expected = first.run(batches).loss.item()
    second, _ = make_stage(tmp_path / "b", *pair, text, cache=cache, **options)

    def never(*_args):
        raise AssertionError("the teacher ran")

    second._targets._teacher.forward = never
    assert second.run(batches).loss.item() == expected
    assert_same(gradients(second), gradients(first), 1e-7)
    with pytest.raises(AssertionError):
        second.run(stream.step(1))
    path = cache._path(batches[0].sequences[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AssertionError):
        second.run(batches)
    uncached, _ = make_stage(tmp_path / "c", *pair, text, **options)
    assert uncached.run(batches).loss.item() == expected


def test_a_cache_of_another_teacher_is_refused(tmp_path):
    TopKCache(tmp_path / "cache", IDENTITY)
    TopKCache(tmp_path / "cache", IDENTITY)
    with pytest.raises(AttnEditError, match="teacher"):
        TopKCache(tmp_path / "cache", IDENTITY | {"teacher": "u"})


def test_stored_float32_weights_are_trained_as_they_are(tmp_path, pair, text):
    """In bf16 too: what trains has float32 masters, which a detour over bf16 would round."""
    teacher, student = pair
    wide = shutil.copytree(student, tmp_path / "wide")
    state = {n: t.float() * 1.0003 for n, t in load_file(wide / "model.safetensors").items()}
    save_file(state, wide / "model.safetensors", metadata={"format": "pt"})
    config = small_config(
        tmp_path, teacher, wide, text, run={"precision": "bf16", "minutes": 1e-9},
        stage2={"lr": 1e-30},
    )  # fmt: skip
    trained = PartsReader(train(config, "stage2").checkpoint, "weights-")
    names = [name for name in trained if not name.startswith("generator/")]
    assert names
    for name in names:
        torch.testing.assert_close(trained.load(name), state[name], rtol=0, atol=1e-29)


def test_blame_names_the_layer(tmp_path, pair, text):
    stage, stream = make_stage(tmp_path, *pair, text)
    batches = stream.step(0)
    mlp = stage.module.student.layers[1].mlp.up_proj.weight
    before = mlp.clone()
    mlp.data.fill_(float("inf"))
    assert stage.blame(batches, stage.run(batches)) == "output of layer 1"
    mlp.data.copy_(before)
    for parameter in stage.trained.values():
        parameter.grad = None
    result = stage.run(batches)
    stage.trained["model.layers.2.self_attn.q_proj.weight"].grad.fill_(float("nan"))
    assert stage.blame(batches, result) == "gradient of layer 2"
    stage.trained["model.layers.3.self_attn.v_proj.weight"].data.fill_(float("nan"))
    assert "weights of layer 3" in stage.blame(batches, result)


def test_cosine_distance_of_opposites():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert cosine_distance([a, a], [a, -a]).item() == pytest.approx(1.0)
