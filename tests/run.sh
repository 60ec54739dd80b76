#!/usr/bin/env bash
# All checks: lint, format, types, tests. Arguments go to pytest, e.g. tests/run.sh tests/unit -k wanda
#
# Everything runs with the newest Python that is here, and so with the newest megatron-core. Then, where Python 3.11 is
# here too, what stands on megatron-core itself runs again with 0.16, the last for that Python: the adapter, models and
# their parity with transformers, checkpoints, training and resuming, the road from import to export; and the kernels, with
# the Triton that a CPU build of PyTorch does not choose. The rest is the same code for both and asks neither.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OLDER=(tests/unit/test_backend.py tests/unit/test_gpu_path.py tests/unit/test_damage.py tests/unit/kernels
    tests/unit/model tests/unit/training tests/unit/statistics tests/parity tests/road tests/distributed/test_resume.py
    tests/distributed/test_training_layouts.py tests/distributed/test_overlap.py tests/distributed/test_fsdp.py)

bash tools/setup_env.sh || exit $?
older=
if [ $# = 0 ] && ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    bash tools/setup_env.sh 3.11
    case $? in
        0) older=.venv-3.11/bin/python ;;
        3) echo "(no Python 3.11 here: nothing is run with megatron-core 0.16)" ;;
        *) exit 1 ;;
    esac
fi
bash tools/setup_maxtext.sh || [ $? -eq 3 ] || exit 1 # without Python 3.12 its tests say that they are skipped
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

lint=0
bash tools/lint.sh || lint=1

if [ $lint -ne 0 ]; then
    echo "(a linter failed above: this run fails whatever the tests say)"
fi
run() {
    echo "== pytest, $("$1" -c 'import platform, importlib.metadata as m; print("Python", platform.python_version() + ", megatron-core", m.version("megatron-core"))')"
    "$1" -m pytest -n 2 --dist loadfile --durations=25 "${@:2}"
}
run .venv/bin/python "$@"
status=$?
if [ -n "$older" ]; then
    run $older "${OLDER[@]}" || status=1
fi
[ $status -ne 0 ] && exit $status
exit $lint
