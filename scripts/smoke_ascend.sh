#!/usr/bin/env bash
# The first thing to run on an Ascend machine: bash scripts/smoke_ascend.sh [npu|cpu]
#
# Asks the device what this project rests on, then serves two small random checkpoints, GateSWA and
# MLA, and compares each token with the reference model. Takes minutes; needs an environment with
# vllm-ascend and this project (docs/ascend.md). With cpu it runs on vLLM's CPU build: a rehearsal.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=${1:-npu}
python=${PYTHON:-python}
attnedit() { "$python" -c "from vllm_attnedit.cli import main; main()" "$@"; }
folder=$(mktemp -d)
log=$folder/log
: >"$log"
ended() {
    local status=$?
    # What the engine says is long, and matters when a step fails.
    ((status == 0)) || { echo "failed with status $status; the end of its log:" >&2; tail -n 40 "$log" >&2; }
    rm -rf "$folder"
}
trap ended EXIT

echo "== 1 of 3: the machine"
attnedit doctor --device "$device"
"$python" -m tests.ascend.checkpoints "$folder" >"$log" 2>&1
step=2
for target in gateswa mla; do
    echo "== $step of 3: $target, served and compared with the reference"
    attnedit verify "$folder/$target" --dtype bfloat16 2>"$log"
    step=$((step + 1))
done
echo "smoke test passed on $device"
