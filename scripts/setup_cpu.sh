#!/usr/bin/env bash
# Makes .venv: vLLM's CPU build, the development tools and this project (editable), from the package index.
#
#   bash scripts/setup_cpu.sh             Python 3.11
#   PYTHON=python3.12 bash scripts/...    another Python, 3.10 to 3.13
#
# A second run takes well under a second: .venv/.setup-stamp, written last, names the inputs it was made
# from. An interrupted run is finished by the next one. demo.sh and test.sh source this file, so that one
# shell receives the signals.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_started=$SECONDS
setup_log=.cache/setup.log
setup_stamp=.venv/.setup-stamp
setup_group=

setup_fail() { printf 'error: %s\n' "$1" >&2; exit 1; }
setup_say() { printf '[%3d s] %s\n' $((SECONDS - setup_started)) "$1"; }

# A step runs in its own process group, which a signal to this script ends as a whole.
setup_interrupted() {
    trap '' INT TERM HUP
    [[ -z $setup_group ]] || kill -TERM -- "-$setup_group" 2>/dev/null || true
    wait 2>/dev/null || true
    printf '\nsetup: interrupted; the next run carries on\n' >&2
    exit "$1"
}

# setup_step LABEL COMMAND...: output goes to the log, whose last lines are shown on failure.
setup_step() {
    local label=$1 status=0 told=$SECONDS
    shift
    setup_say "$label"
    printf '\n== %s\n' "$label" >>"$setup_log"
    set -m
    "$@" >>"$setup_log" 2>&1 </dev/null 9>&- &
    setup_group=$!
    set +m
    while kill -0 "$setup_group" 2>/dev/null; do
        if ((SECONDS - told >= 15)); then
            told=$SECONDS
            setup_say "  ... $(setup_progress)"
        fi
        sleep 0.2
    done
    wait "$setup_group" || status=$?
    setup_group=
    if ((status != 0)); then
        grep -v '^WARNING: Location' "$setup_log" | tail -n 15 >&2
        setup_fail "\"$label\" failed (status $status); see above and $setup_log, then run this again"
    fi
}

setup_progress() {
    local fetched installed total
    fetched=$(grep -c '^Collecting' "$setup_log" || true)
    installed=$(find .venv/lib -maxdepth 3 -name '*.dist-info' 2>/dev/null | wc -l)
    total=$(grep -oE '^[a-z0-9._-]+' requirements/cpu.txt | sort -u | wc -l)
    echo "$fetched packages fetched, $installed installed, of about $total"
}

setup_inputs() {
    { "$1" --version; pwd -P; cat requirements/cpu.txt requirements/vllm-distribution/pyproject.toml \
        pyproject.toml scripts/setup_cpu.sh; } 2>&1 | sha256sum | cut -d' ' -f1
}

setup_check_machine() {
    local need_gb=9 free_gb    # 7.3 GB at its fullest, measured; the rest is for what is then run
    [[ $(uname -sm) == "Linux x86_64" ]] \
        || setup_fail "this is $(uname -sm); the CPU environment is locked for Linux x86_64 only"
    command -v git >/dev/null || setup_fail "git not found; install it (Debian: apt-get install git)"
    "$python" -c '' 2>/dev/null || setup_fail \
        "$python not found or not working; install it (Debian: apt-get install python3.11 python3.11-venv) or set PYTHON to a Python 3.10 to 3.13"
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || setup_fail \
        "$python is $("$python" --version 2>&1); set PYTHON to a Python 3.10 to 3.13"
    "$python" -c 'import venv, ensurepip' 2>/dev/null || setup_fail \
        "$python cannot make environments; install its venv module (Debian: apt-get install python3.11-venv)"
    [[ ! -d .venv ]] || need_gb=2
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
    ((free_gb >= need_gb)) || setup_fail \
        "$free_gb GB free in $PWD, $need_gb GB needed; make room or work on another disk"
}

# pip takes a package whose metadata lies there for installed, even when it was stopped while copying: RECORD
# comes last. Without the metadata the next install copies it anew.
setup_drop_half_installed() {
    local info
    for info in .venv/lib/python3.*/site-packages/*.dist-info; do
        [[ ! -d $info || -s $info/RECORD ]] || rm -rf "$info"
    done
}

setup_make_venv() {
    local pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input --retries 10)
    # Without pip's cache, which would keep 3 GB of wheels that are wanted once.
    local install=(install --no-deps --no-cache-dir --progress-bar off --root-user-action ignore)
    rm -rf "$setup_stamp" .cache/old-venv.*
    [[ ! -d .venv || -f .venv/.made-for ]] || setup_fail \
        "$PWD/.venv was not made by this script; move it away, then run this again"
    # Another Python, a moved folder, or stopped before pip was there: begin anew.
    if [[ -d .venv ]] && { [[ $(cat .venv/.made-for) != "$made_for" ]] \
        || ! .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
        mv .venv ".cache/old-venv.$$"
        setup_step "removing the old .venv" rm -rf ".cache/old-venv.$$"
    fi
    if [[ ! -d .venv ]]; then
        mkdir .venv
        printf '%s\n' "$made_for" >.venv/.made-for
        setup_step "making .venv with $("$python" --version 2>&1)" "$python" -m venv .venv
    fi
    setup_drop_half_installed
    # pip fetches every wheel of a call before it installs the first: two calls, and 2 GB less lie on the disk
    # at a time. What the first installed, the second finds.
    grep -E '^(torch|triton|nvidia-)' requirements/cpu.txt >.cache/largest.txt
    setup_step "installing PyTorch and what it loads (5 GB on disk, 1 to 2 minutes)" \
        "${pip[@]}" "${install[@]}" -r .cache/largest.txt
    setup_step "installing the other locked packages (2 GB on disk, 1 to 2 minutes)" \
        "${pip[@]}" "${install[@]}" -r requirements/cpu.txt
    setup_step "installing this project and the metadata of distribution vllm" \
        "${pip[@]}" "${install[@]}" --no-build-isolation ./requirements/vllm-distribution -e .
    setup_step "trying the vllm command" env VLLM_PLUGINS= .venv/bin/vllm --version
}

setup_main() {
    local python=${PYTHON:-} inputs made_for
    # Without a wish, a .venv that is there keeps the Python it was made with.
    [[ -n $python ]] || { [[ -s $setup_stamp ]] && python=.venv/bin/python || python=python3.11; }
    if [[ -s $setup_stamp && $(cat "$setup_stamp") == "$(setup_inputs "$python")" ]]; then
        return 0
    fi
    [[ -n ${PYTHON:-} ]] || python=python3.11
    setup_check_machine
    mkdir -p .cache
    exec 9>.cache/setup.lock
    flock -n 9 || { setup_say "waiting for another setup in this folder"; flock 9; }
    inputs=$(setup_inputs "$python")
    if [[ ! -s $setup_stamp || $(cat "$setup_stamp") != "$inputs" ]]; then
        trap 'setup_interrupted 130' INT
        trap 'setup_interrupted 143' TERM HUP
        made_for="$("$python" --version 2>&1) in $(pwd -P)"
        : >"$setup_log"
        setup_make_venv
        printf '%s\n' "$inputs" >"$setup_stamp"
        trap - INT TERM HUP
        setup_say "ready: .venv"
    fi
    exec 9>&-
}

setup_main
