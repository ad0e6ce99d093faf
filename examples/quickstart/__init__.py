"""From a real pretrained model to an answer over the OpenAI API, on a CPU.

``python -m examples.quickstart`` is what ``scripts/demo.sh`` runs once the environment is there.
"""
