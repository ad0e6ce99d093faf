#!/usr/bin/env bash
# The Ascend side without an NPU: bash scripts/test_ascend.sh [all|short|backend|kernels] [pytest arguments]
#
#   backend   rungs c and d: operator schemas; vllm-ascend's own backend classes
#   kernels   rungs a and b: kernels in the interpreter; lowered for 910B
#   short     rung b: a small environment and half a minute, part of scripts/test.sh
#
# docs/ascend.md says what each rung shows.
set -euo pipefail

suite=${1:-all}
[[ $# -eq 0 ]] || shift
case $suite in
    all) parts=(backend kernels) ;;
    short) parts=(kernels) ;;
    backend | kernels) parts=("$suite") ;;
    *)
        echo "error: suite $suite: choose all, short, backend or kernels" >&2
        exit 2
        ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/setup_ascend.sh"
ascend_main "${parts[@]}"

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
# torch would load torch_npu, and with it CANN, by itself.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
[[ $suite != short ]] || set -- --deselect tests/ascend/kernels/test_a_interpreter.py "$@"
for part in "${parts[@]}"; do
    printf '\n==== ascend: %s\n' "$part"
    LD_LIBRARY_PATH=$ascend_home/$part/stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
        "$ascend_home/$part/bin/python" -m pytest --durations=5 --durations-min=1 \
        -W ignore::DeprecationWarning "tests/ascend/$part" "$@" </dev/null
done
