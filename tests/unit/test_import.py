"""What importing the package costs and does, each in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light_and_quick():
    """Best of three: another process may hold the core once."""
    code = """
        import sys, time
        start = time.perf_counter()
        import vllm_attnedit
        seconds = time.perf_counter() - start
        print(seconds, *[m for m in ("torch", "vllm", "triton") if m in sys.modules])
    """
    runs = [run(code).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 1.0
    assert all(modules == [] for _, *modules in runs)


AUTO = """
    {imports}
    config = AutoConfig.for_model(
        "attnedit", base_model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
        attention_edit={{"sliding_window": 4,
                         "layer_types": ["sliding_attention", "full_attention"]}},
    )
    print(type(AutoModelForCausalLM.from_config(config)).__module__)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import vllm_attnedit; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import vllm_attnedit",
        "from transformers import AutoConfig; import vllm_attnedit; "
        "from transformers import AutoModelForCausalLM",
    ],
)
def test_auto_classes_know_the_model_whatever_the_import_order(imports: str):
    assert run(AUTO.format(imports=imports)) == "vllm_attnedit.hf.modeling"


@pytest.mark.parametrize(
    "module", ["config", "tensors", "accounting", "hf", "edit", "models.causal_lm", "cli", "plugin"]
)
def test_every_module_can_be_the_first_import(module: str):
    run(f"import vllm_attnedit.{module}; from transformers import AutoModelForCausalLM")


def test_transformers_alone_is_left_as_it_was():
    code = """
        from transformers import AutoConfig, CONFIG_MAPPING
        assert "attnedit" not in CONFIG_MAPPING
        import sys
        assert "vllm_attnedit" not in sys.modules
    """
    run(code)
