"""Numbers that a device computes with."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._inductor import config as inductor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from training.attention import choose
from training.config import RunConfig
from training.parallel import Devices
from vllm_attnedit.errors import AttnEditError


@pytest.mark.parametrize(
    ("precision", "products", "dtype", "kernel"),
    [
        ("bf16", "highest", torch.bfloat16, "varlen"),
        ("tf32", "high", torch.float32, "sdpa"),
        ("fp32", "highest", torch.float32, "sdpa"),
    ],
)
def test_precision(monkeypatch, precision, products, dtype, kernel):
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    devices = Devices(RunConfig(device="cpu", precision=precision, deterministic=False), seed=0)
    assert asked == [products]
    assert devices.compute_dtype == dtype
    with devices.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype
    assert choose("auto", torch.device("cuda"), precision) == kernel


@pytest.mark.parametrize("deterministic", [True, False])
def test_training_is_strict_or_free(deterministic):
    """Asked to warn only, flash attention would warn and add up its gradients in any order. PyTorch
    keeps the compiler from choosing by timing; where it rounds is ours to say."""
    torch.use_deterministic_algorithms(False)
    devices = Devices(RunConfig(device="cpu", deterministic=deterministic), seed=0)
    with devices.strict():
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert inductor.deterministic == inductor.emulate_precision_casts == deterministic
    assert not inductor.emulate_precision_casts
    assert torch.is_deterministic_algorithms_warn_only_enabled() == deterministic


def test_what_cannot_repeat_every_bit_is_named():
    devices = Devices(RunConfig(device="cpu"), seed=0)
    said = r"run.deterministic: True: set it to false: put_ does not .*implementation$"
    with pytest.raises(AttnEditError, match=said), devices.strict():
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="another"), devices.strict():
        raise RuntimeError("another: {'are_deterministic_algorithms_enabled': True}")


@pytest.fixture
def group(tmp_path):
    """A group of one process, which is enough to see what would be sharded."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("frozen", "trained", "sharded", "units"),
    [
        (True, ["attention"], {"attention", "mlp", "head"}, 3),
        (False, ["attention"], {"attention"}, 1),
        (False, ["attention", "mlp", "head"], {"attention", "mlp", "head"}, 3),
        (False, [], set(), 0),  # a teacher
    ],
)
def test_what_is_sharded(group, frozen, trained, sharded, units):
    def linear(name):
        return name, nn.Linear(4, 4)

    layers = [nn.Sequential(OrderedDict([linear("attention"), linear("mlp")])) for _ in range(2)]
    model = nn.Sequential(OrderedDict([("0", layers[0]), ("1", layers[1]), linear("head")]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in trained)
    run = RunConfig(device="cpu", sharding="fsdp2", shard_frozen=frozen, deterministic=False)
    assert Devices(run, seed=0).shard(model, layers) is model
    found = {
        (part, isinstance(parameter, DTensor))
        for name, parameter in model.named_parameters()
        for part in ("attention", "mlp", "head")
        if part in name and (parameter.ndim > 1 or not parameter.requires_grad)
    }
    assert found == {(part, part in sharded) for part in ("attention", "mlp", "head")}
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == units
    # Autocast would leave them in float32.
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    assert not any(isinstance(parameter, DTensor) for parameter in vectors)
