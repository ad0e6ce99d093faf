"""Every option of every command, with its default and its meaning, in one place.

``python -m training options`` prints this table. A field is set in YAML, or on the command line by
its dotted name: ``--optim.tokens 50e6 --data.sources.0.path chat.jsonl``.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal


def option(doc: str, default: Any = MISSING) -> Any:
    """A documented dataclass field; a list, dict or section gets a fresh default each time."""
    metadata = {"doc": doc}
    if default is MISSING:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class SourceConfig:
    """One origin of documents."""

    kind: Literal["text", "chat", "hub", "teacher"] = option(
        "text: files or folders of text; chat: JSON lines of conversations; hub: a data set that "
        "`datasets` loads; teacher: what `python -m training generate` wrote"
    )
    path: str = option("file, folder or glob; for hub, the id of the data set or its folder")
    name: str | None = option("configuration of a hub data set", None)
    split: str = option("split of a hub data set", "train")
    column: str | None = option(
        "hub column or JSON field that holds the text or the conversation; by default the first of "
        "text, content, messages, conversations that exists",
        None,
    )
    separator: str | None = option(
        "cuts a text file into documents; without it a file is one document", None
    )
    max_tokens: int | None = option("stop reading this source after so many tokens", None)


@dataclass(kw_only=True)
class DataConfig:
    """Documents, and how they become sequences."""

    sources: list[SourceConfig] = option(
        "where documents come from; empty: `shards` is complete already", list
    )
    shards: str | None = option("folder of the tokenised shards; default <output>/shards", None)
    sequence_length: int = option("tokens in a packed sequence", 2048)
    loss_on: Literal["all", "answers"] = option(
        "Stage 2: learn from every token, or only from what the assistant says in chat sources",
        "all",
    )


@dataclass(kw_only=True)
class RunConfig:
    """Devices and numbers."""

    device: Literal["auto", "cpu"] = option("auto: what accelerate finds (CUDA, NPU, ...)", "auto")
    precision: Literal["bf16", "tf32", "fp32"] = option(
        "bf16: compute in bfloat16, trained weights and optimiser in float32; tf32: float32, but "
        "products in TF32 where a GPU has it",
        "bf16",
    )
    attention: Literal["auto", "varlen", "flex", "sdpa"] = option(
        "kernel for packed sequences; auto: varlen (flash attention by document) on CUDA in bf16, "
        "sdpa with a mask elsewhere",
        "auto",
    )
    compile: bool = option("torch.compile of layers and of the loss", False)
    gradient_checkpointing: bool = option(
        "recompute each student layer in Stage 2's backward", False
    )
    deterministic: bool = option(
        "deterministic kernels alone: a resumed run repeats every bit; false: faster on GPUs", True
    )
    sharding: Literal["none", "fsdp2"] = option(
        "none: every device holds the models; fsdp2: teacher and student are sharded", "none"
    )
    shard_frozen: bool = option(
        "of fsdp2: shard what does not train as well, the teacher with it; false exchanges less, "
        "where every device has room for both models",
        True,
    )
    minutes: float | None = option(
        "save and stop (status 0) after so many minutes; resume later", None
    )


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    tokens: float = option("tokens of the whole run", 50e6)
    batch: int = option("sequences of one optimiser step, over all devices", 32)
    micro_batch: int = option("sequences of one forward pass on one device", 8)
    warmup: float = option("share of the steps with rising learning rate", 0.02)
    min_lr_ratio: float = option("last learning rate over the peak", 0.01)
    weight_decay: float = option("decoupled, on matrices only", 0.0)
    beta1: float = option("AdamW", 0.9)
    beta2: float = option("AdamW", 0.95)
    eps: float = option("AdamW", 1e-8)
    clip: float = option(
        "largest gradient norm: per layer in Stage 1, of all in Stage 2; 0: off", 1.0
    )


@dataclass(kw_only=True)
class Stage1Config:
    """Layer-wise teacher forcing."""

    lr: float = option("peak learning rate", 1e-3)
    layers: list[int] | None = option("layers to train; default: all", None)
    split: Literal["data", "layers"] = option(
        "over several devices: data (each sees its share, gradients are averaged) or layers (each "
        "sees everything and trains its share of the layers, without communication)",
        "data",
    )


@dataclass(kw_only=True)
class Stage2Config:
    """Model-level distillation."""

    lr: float = option("peak learning rate of the edited attention", 3e-4)
    trainable: Literal["attention", "all"] = option("which tensors train", "attention")
    lr_rest: float = option("peak learning rate of the rest, if trainable is all", 1e-5)
    cosine_weight: float = option(
        "weight of 1 - cos(student, teacher), averaged over the hidden states after every layer",
        0.0,
    )
    chunk_tokens: int = option("tokens whose logits exist at once", 4096)
    fp32_logits: bool = option("form logits in float32 even if precision is bf16", False)
    top_k: int | None = option(
        "keep only the teacher's k likeliest tokens (the others count as one); default: all",
        None,
    )
    cache: str | None = option(
        "folder for top-k teacher logits: later runs on the same data need no teacher pass", None
    )


@dataclass(kw_only=True)
class CheckpointConfig:
    """What survives, and in which form."""

    every_steps: int | None = option("save after so many steps", 500)
    every_minutes: float | None = option("save after so many minutes", 15.0)
    keep: int = option("how many to keep", 2)
    parts_mb: float | None = option("cut files so that none exceeds so many MiB", None)
    weights: Literal["fp32", "bf16"] = option(
        "of trained weights in a checkpoint; bf16 halves it, a resumed run is then not bit for bit",
        "fp32",
    )
    optimizer: Literal["fp32", "bf16", "none"] = option(
        "of AdamW's moments in a checkpoint; none: a resumed run warms up again", "fp32"
    )
    resume: str = option(
        "auto: from the newest in <output>; never; or the folder of a checkpoint", "auto"
    )
    export: Literal["checkpoint", "edit", "both", "none"] = option(
        "what a finished run writes: <output>/model (for vllm serve), <output>/edit.safetensors "
        "(the edited tensors alone), both, or none: its checkpoint is all there is",
        "checkpoint",
    )


@dataclass(kw_only=True)
class LogConfig:
    """What a run shows of itself."""

    every: int = option("steps between progress lines", 10)
    tensorboard: bool = option("write <output>/tensorboard", True)
    curves: bool = option("draw <output>/curves.png at every checkpoint", True)
    profile: int | None = option(
        "trace so many steps, after the first 20, to <output>/trace.json.gz (for Perfetto or "
        "chrome://tracing)",
        None,
    )
    peak_tflops: float | None = option(
        "bf16 peak of the device for the MFU; default: by device name (H100, H200, A100, ...)", None
    )


@dataclass(kw_only=True)
class GenerateConfig:
    """Text that the teacher writes itself."""

    path: str | None = option("JSON lines to write; default <output>/teacher.jsonl", None)
    seeds: str | None = option(
        "file with one short beginning per line; default: beginnings drawn from the vocabulary",
        None,
    )
    samples: int = option("texts to write", 1000)
    seed_tokens: int = option("length of a drawn beginning", 4)
    max_tokens: int = option("longest continuation", 1024)
    temperature: float = option("of sampling", 1.0)
    top_p: float = option("of sampling", 0.98)
    batch: int = option("texts between two writes to disk; what is on disk survives", 512)
    vllm: dict[str, Any] = option("more arguments of vllm.LLM, such as max_model_len", dict)


@dataclass(kw_only=True)
class PasskeyConfig:
    """Retrieval of a number hidden in filler text."""

    lengths: list[int] = option("prompt lengths in tokens; empty: leave the test out", list)
    depths: list[float] = option(
        "where the number hides: 0 first, 1 last", lambda: [0.0, 0.25, 0.5, 0.75, 1.0]
    )
    trials: int = option("numbers per length and depth", 10)


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured, and on which models."""

    label: str = option("model name in reports, such as smollm2-135m", "model")
    models: dict[str, str] = option(
        "name: folder or edit; default: the student (untrained, or the stage that trained it) and "
        "trained (<output>/model, or its edit.safetensors)",
        dict,
    )
    baselines: list[Literal["sinks", "chosen"]] = option(
        "training-free rivals: the student's windows plus sinks on the unedited teacher; windows "
        "with full layers chosen by calibration NLL",
        list,
    )
    sinks: int = option("first tokens that the sinks baseline always sees", 4)
    perplexity: dict[str, str] = option("name: text file", dict)
    lengths: list[int] = option("context lengths of perplexity", lambda: [1024, 2048, 4096, 8192])
    agreement_length: int = option("context length of top-1 agreement and KL to the teacher", 2048)
    max_windows: int | None = option("windows of each text and length; default: all", None)
    tasks: list[str] = option(
        "local task files by stem (arc_easy, ...), or names of lm-evaluation-harness tasks", list
    )
    task_files: str | None = option("folder of local task files", None)
    fewshot: list[int] = option("numbers of examples", lambda: [0])
    limit: int | None = option("questions of each task; default: all", None)
    passkey: PasskeyConfig = option("passkey retrieval", PasskeyConfig)
    batch: int = option("sequences of one forward pass", 16)
    report: str | None = option("folder of the report; default <output>/evaluation", None)


@dataclass(kw_only=True)
class ChooseConfig:
    """Which layers stay full, by the loss of the teacher on a calibration text."""

    text: str | None = option("calibration text file", None)
    count: int | None = option("full layers; default: one in six", None)
    window: int = option("of the other layers", 128)
    sequence_length: int = option("tokens of a calibration sequence", 2048)
    sequences: int = option("calibration sequences", 8)
    sinks: int = option(
        "first tokens that window layers see besides their window on trial; with 0 the choice "
        "falls on layers that miss the first token, which training makes up for by itself",
        0,
    )


@dataclass(kw_only=True)
class Config:
    """One run."""

    teacher: str = option("folder, hub id or .gguf file of the unedited model")
    student: str | None = option(
        "folder of the edited model to train (see `attnedit edit`), or the file of an edit alone",
        None,
    )
    output: str = option("folder of everything that the run writes")
    seed: int = option("of data order and sampling", 0)
    data: DataConfig = option("documents", DataConfig)
    run: RunConfig = option("devices", RunConfig)
    optim: OptimConfig = option("optimiser", OptimConfig)
    stage1: Stage1Config = option("layer-wise stage", Stage1Config)
    stage2: Stage2Config = option("model-level stage", Stage2Config)
    checkpoint: CheckpointConfig = option("saving", CheckpointConfig)
    log: LogConfig = option("logging", LogConfig)
    generate: GenerateConfig = option("teacher-written text", GenerateConfig)
    evaluate: EvaluateConfig = option("evaluation", EvaluateConfig)
    choose: ChooseConfig = option("choice of full layers", ChooseConfig)
