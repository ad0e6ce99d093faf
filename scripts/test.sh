#!/usr/bin/env bash
# The tests: bash scripts/test.sh [all|quality|unit|integration|ascend|e2e] [pytest arguments]
#
#   quality      lint, format and types
#   unit         tests/unit
#   integration  tests/integration: the vLLM engine on tiny random checkpoints
#   ascend       kernels lowered for an Ascend 910B: the short form of scripts/test_ascend.sh
#   e2e          tests/e2e: commands and servers on a real model, which is fetched first
#   all          these five in this order (the default); the first failure ends the run
#
# tests/gpu needs its device and is run with pytest directly; all of tests/ascend by test_ascend.sh.
set -euo pipefail

suite=${1:-all}
[[ $# -eq 0 ]] || shift
case $suite in
    all) parts=(quality unit integration ascend e2e) ;;
    quality | unit | integration | ascend | e2e) parts=("$suite") ;;
    *)
        echo "error: suite $suite: choose all, quality, unit, integration, ascend or e2e" >&2
        exit 2
        ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/setup_cpu.sh"

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false
export PATH="$PWD/.venv/bin:$PATH"

run_quality() {
    echo "== ruff check"
    ruff check .
    echo "== ruff format --check"
    ruff format --check .
    echo "== mypy"
    mypy
}

run_pytest() {
    python -m pytest --durations=10 --durations-min=1 "$@" </dev/null
}

# run_spread FOLDER [ARGUMENTS...]: on up to four cores, then the tests that measure time, one by one.
# With arguments of the caller's, who may choose a single test, all one by one.
run_spread() {
    # Tiny tensors: a second thread costs more than it brings.
    export OMP_NUM_THREADS=1
    if (($# > 1)); then
        run_pytest "$@"
    else
        run_pytest "$1" -n auto --maxprocesses 4 --dist worksteal -m "not alone"
        run_pytest "$1" -m alone
    fi
}

times=()
finished() {
    local status=$?
    ((${#times[@]} == 0)) || printf 'passed:%s\n' "$(printf ' %s' "${times[@]}")"
    ((status == 0)) || echo "failed: $part (status $status)"
}
part=setup
trap finished EXIT

for part in "${parts[@]}"; do
    started=$SECONDS
    printf '\n==== %s\n' "$part"
    case $part in
        quality) run_quality ;;
        unit | integration) (run_spread "tests/$part" "$@") ;;
        ascend) bash scripts/test_ascend.sh short "$@" ;;
        e2e)
            python -m examples.quickstart.teacher
            run_pytest tests/e2e "$@"
            ;;
    esac
    times+=("$part $((SECONDS - started)) s,")
done
