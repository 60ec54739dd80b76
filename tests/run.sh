#!/usr/bin/env bash
# All checks: lint, format, types, tests. Arguments go to pytest, e.g. tests/run.sh tests/unit -k wanda
#
# With --nightly first, also what is marked `nightly`: more layouts, sizes and environments of what is tested anyway,
# which take as long again.
#
# Everything runs with the newest Python that is here, and so with the newest megatron-core. Then, where Python 3.11 is
# here too, what stands on megatron-core itself runs again with 0.16, the last for that Python: the adapter, models and
# their parity with transformers, checkpoints, training, the road from import to export. The rest is the same code for both
# and asks neither; nightly more of it runs again, and the kernels, with the Triton that a CPU build of PyTorch does not
# choose.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OLDER=(tests/unit/test_backend.py tests/unit/model tests/unit/training/test_checkpoints.py
    tests/unit/training/test_recovery.py tests/parity/test_logits.py tests/road/test_road.py)
OLDER_NIGHTLY=(tests/unit/test_gpu_path.py tests/unit/test_damage.py tests/unit/kernels tests/unit/training
    tests/unit/statistics tests/parity tests/road tests/distributed/test_recovery.py tests/distributed/test_resume.py
    tests/distributed/test_training_layouts.py tests/distributed/test_overlap.py)

nightly=()
if [ "${1:-}" = --nightly ]; then
    nightly=(--nightly) OLDER+=("${OLDER_NIGHTLY[@]}")
    shift
fi

# What does not wait for another goes on beside it, or one core would be idle: in a group of its own, which ends with this.
beside() {
    set -m
    "$@" &
    set +m
}
said=$(mktemp) || exit 1
# shellcheck disable=SC2329  # the trap calls it
end() {
    local job
    for job in $(jobs -p); do kill -- "-$job" 2> /dev/null; done
    rm -f "$said"
}
trap end EXIT
beside bash tools/setup_maxtext.sh # without Python 3.12 its tests say that they are skipped
maxtext=$!
bash tools/setup_env.sh || exit $?
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
beside bash tools/lint.sh > "$said" 2>&1
linters=$!
older=
if [ $# = 0 ] && ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    bash tools/setup_env.sh 3.11
    case $? in
        0) older=.venv-3.11/bin/python ;;
        3) echo "(no Python 3.11 here: nothing is run with megatron-core 0.16)" ;;
        *) exit 1 ;;
    esac
fi
wait $maxtext || [ $? -eq 3 ] || exit 1
lint=0
wait $linters || lint=1
cat "$said"
if [ $lint -ne 0 ]; then
    echo "(a linter failed above: this run fails whatever the tests say)"
fi
run() {
    echo "== pytest, $("$1" -c 'import platform, importlib.metadata as m; print("Python", platform.python_version() + ", megatron-core", m.version("megatron-core"))')"
    local files status
    files=$(mktemp -d) || return 1 # what tests write goes with them, and before the next environment begins
    TMPDIR=$files "$1" -m pytest -n 2 --dist loadfile --durations=25 "${nightly[@]}" "${@:2}"
    status=$?
    echo "(what the tests wrote: $(du -sm "$files" | cut -f1) MiB; free now: $(df -m --output=avail "$files" | tail -1 | tr -d ' ') MiB)"
    [ $status -ne 0 ] || rm -rf "$files" # what failed may be looked at
    return $status
}
run .venv/bin/python "$@"
status=$?
if [ -n "$older" ]; then
    run $older "${OLDER[@]}" || status=1
fi
[ $status -ne 0 ] && exit $status
exit $lint
