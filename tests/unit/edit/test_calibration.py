"""Statistics from running a teacher layer by layer: those of running it whole."""

from __future__ import annotations

import pytest
import torch

from tests.unit.edit.models import load
from tests.unit.tiny import FAMILY_NAMES, tiny_tokenizer
from vllm_attnedit.edit import Calibration
from vllm_attnedit.edit.calibration import run_statistics
from vllm_attnedit.edit.statistics import PRIOR_SHARE, statistics_from_weights
from vllm_attnedit.edit.teacher import open_teacher
from vllm_attnedit.errors import AttnEditError

TEXT = Calibration("the hat and the cat are in the room of anders, " * 20, "test", 300)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_layer_by_layer_is_what_the_whole_teacher_sees(teacher_of, family):
    model = load(teacher_of(family))
    model.set_attn_implementation("eager")
    ids = TEXT.windows(tiny_tokenizer())
    inputs, weights = [], []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _m, _a, out: inputs.append(out))
        layer.self_attn.register_forward_hook(lambda _m, _a, out: weights.append(out[1]))
    with torch.no_grad():
        model(ids)

    with open_teacher(teacher_of(family)) as teacher:
        found = list(run_statistics(teacher, TEXT))
        assert len(found) == 4
        for index, statistics in enumerate(found):
            x = inputs[index].flatten(0, 1).double()
            if family == "qwen2":
                x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
            prior = statistics_from_weights(teacher.store, teacher.config, index).query.matrix
            received = weights[index].double().sum((1, 2))  # (B, T)
            received = (received * received.shape[1] / received.sum(1, keepdim=True)).flatten()
            for moment, share in ((statistics.query, 0 * received + 1), (statistics.key, received)):
                by_token = (1 + share) / 2
                expected = (x * by_token[:, None]).T @ x / len(x)
                expected = (1 - PRIOR_SHARE) * expected + PRIOR_SHARE * prior
                assert torch.allclose(moment.matrix, expected, atol=1e-4)
                assert moment.mean is not None
                mean = (1 - PRIOR_SHARE) * (by_token @ x) / len(x)
                assert torch.allclose(moment.mean, mean, atol=1e-4)
            _check_distances(statistics.distances, weights[index].double())


def _check_distances(found, weights) -> None:
    length = weights.shape[-1]
    for distance in (0, 1, length - 1):
        expected = sum(
            weights[:, :, query, query - distance].sum(0)
            for query in range(distance, length)
            if query > distance  # the first key is left out
        )
        assert torch.allclose(
            found[:, distance], torch.as_tensor(expected).double() + 0 * found[:, 0], atol=1e-4
        )


def test_windows_are_cut_and_begun_as_the_tokenizer_does():
    tokenizer = tiny_tokenizer()
    text = Calibration("abcdefghij" * 200, "test", 1500)
    assert text.windows(tokenizer).shape == (2, 512)
    assert Calibration("abc" * 200, "test", 100).windows(tokenizer).shape == (1, 100)

    def with_start(content: str, add_special_tokens: bool = True, **options):
        result = tokenizer(content, add_special_tokens=False, **options)
        if add_special_tokens:
            result["input_ids"] = [1, *result.input_ids]
        return result

    windows = text.windows(with_start)
    assert windows.shape == (2, 512)
    assert (windows[:, 0] == 1).all()
    assert windows[1, 1] == tokenizer("abcdefghij" * 200).input_ids[511]


def test_texts_too_short_or_of_another_vocabulary(teacher_of):
    with pytest.raises(AttnEditError, match=r"--calibration: test: give a longer text .* 3 tokens"):
        Calibration("abc", "test", 100).windows(tiny_tokenizer())
    with open_teacher(teacher_of("llama")) as teacher:
        teacher.config.vocab_size = 100
        with pytest.raises(AttnEditError, match=r"tokenizer: .*below 100"):
            next(run_statistics(teacher, TEXT))


def test_the_builtin_text_is_long_and_always_the_same():
    text = Calibration.builtin()
    assert len(text.text) == 16 * 4096
    assert text.describe() == Calibration.builtin().describe()
    assert text.describe()["source"] == "pydoc_data.topics"


def test_text_from_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("ä" * 1000, encoding="utf-8")
    text = Calibration.from_file(tmp_path / "a.txt", 10)
    assert text.text == "ä" * 160
    assert text.source == "a.txt"
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AttnEditError, match=r"--calibration: .*give a UTF-8 text file"):
        Calibration.from_file(tmp_path / "b.txt")
