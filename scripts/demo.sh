#!/usr/bin/env bash
# The main job on a real model: environment, teacher, edit, serve, an answer. Repeat it freely: what is
# there is used again. Arguments go to `python -m examples.quickstart` (--question "...").
set -euo pipefail
# Sourced: one shell, so that a signal reaches whatever runs.
. "$(dirname "${BASH_SOURCE[0]}")/setup_cpu.sh"
exec .venv/bin/python -m examples.quickstart "$@"
