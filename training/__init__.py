"""Progressive distillation: from a teacher to an edited model that keeps its scores.

Map of the package, in the order in which a run uses it:

- ``config`` (every option, documented), ``options`` (YAML and ``--key value``), ``cli``
- ``data/``: documents -> tokenised shards -> packed sequences -> batches
- ``attention`` (document masks, fast kernels), ``models`` (teacher and student), ``parallel``
  (devices)
- ``layerwise`` (Stage 1), ``kl``, ``targets``, ``distill`` (Stage 2), ``optim``
- ``loop`` (steps, signals, limits), ``checkpoint``, ``resuming``, ``parts``, ``export``,
  ``repack``, ``progress``, ``curves``
- ``evaluation/``, ``layer_choice``, ``generate``

It runs the reference model of ``vllm_attnedit.hf`` and never imports vLLM; ``generate`` starts
vLLM's public API in a process of its own.
"""
