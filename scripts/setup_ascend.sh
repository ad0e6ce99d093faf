#!/usr/bin/env bash
# Makes the environments of tests/ascend, from the package index: no NPU and no CANN needed.
#
#   bash scripts/setup_ascend.sh [backend|kernels]     both by default
#
#   backend   vllm-ascend on its own torch, and stand-ins for CANN's libraries (7 GB, 2 minutes)
#   kernels   Triton for Ascend and its compiler (0.7 GB, seconds)
#
# They lie in .cache/ascend, over .venv, which is made first: what an environment lacks comes from
# there. A second run takes well under a second. test_ascend.sh sources this file.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_cpu.sh"

ascend_home=$PWD/.cache/ascend

setup_progress() { tail -n 1 "$setup_log" | cut -c 1-100; }

ascend_inputs() {
    # Not what .venv holds: it lies beneath, and is found as it is.
    { .venv/bin/python --version; pwd -P; cat "requirements/ascend-$1.txt" tests/ascend/cann_stubs.py \
        scripts/setup_ascend.sh; } | sha256sum | cut -d' ' -f1
}

ascend_check_machine() {
    local need_gb=$1 free_gb tool
    for tool in nm readelf cc; do
        command -v "$tool" >/dev/null || setup_fail \
            "$tool not found; install binutils and a C compiler (Debian: apt-get install binutils gcc)"
    done
    free_gb=$(($(df -Pk .cache | awk 'NR == 2 {print $4}') / 1024 / 1024))
    ((free_gb >= need_gb)) || setup_fail "$free_gb GB free in $PWD, $need_gb GB needed"
}

# ascend_make NAME NEEDED_GB
ascend_make() {
    local name=$1 folder=$ascend_home/$1 stamp=$ascend_home/$1/.setup-stamp inputs packages
    inputs=$(ascend_inputs "$name")
    [[ -s $stamp && $(cat "$stamp") == "$inputs" ]] && return 0
    ascend_check_machine "$2"
    rm -rf "$folder"
    mkdir -p "$ascend_home"
    : >"$setup_log"
    setup_step "making the $name environment" .venv/bin/python -m venv "$folder"
    setup_step "installing its packages" "$folder/bin/python" -m pip --disable-pip-version-check \
        --no-input --retries 10 install --no-deps --no-compile --progress-bar off \
        --root-user-action ignore -r "requirements/ascend-$name.txt"
    packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # .pth files of .venv count too: that is how an editable install is found.
    printf 'import site; site.addsitedir("%s")\n' \
        "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
        >"$packages/beneath.pth"
    if [[ $name == backend ]]; then
        setup_step "making stand-ins for CANN" "$folder/bin/python" tests/ascend/cann_stubs.py \
            "$packages" "$folder/stubs"
    fi
    printf '%s\n' "$inputs" >"$stamp"
    setup_say "ready: ${folder#"$PWD"/}"
}

ascend_main() {
    local wanted=("$@")
    ((${#wanted[@]})) || wanted=(backend kernels)
    mkdir -p .cache
    exec 9>.cache/setup.lock
    flock 9
    trap 'setup_interrupted 130' INT
    trap 'setup_interrupted 143' TERM HUP
    for name in "${wanted[@]}"; do
        case $name in
            backend) ascend_make backend 10 ;;
            kernels) ascend_make kernels 2 ;;
            *) setup_fail "$name: choose backend or kernels" ;;
        esac
    done
    trap - INT TERM HUP
    exec 9>&-
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || ascend_main "$@"
