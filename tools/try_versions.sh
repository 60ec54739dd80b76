#!/usr/bin/env bash
# The tests of what touches transformers and PyTorch most, with the oldest and the newest versions that pyproject.toml allows.
#
#     tools/try_versions.sh [SPECS ...]
#
# Each argument is one environment: requirements beside this package, separated by spaces, made anew in .venv-try with the
# newest Python here and removed afterwards. Left out: the oldest transformers, the newest transformers, the newest PyTorch.
# Exit status 1 when the tests fail with one of them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

TESTS=(tests/parity tests/unit/model tests/unit/export tests/unit/data/test_tokenizer.py tests/unit/training
    tests/unit/test_backend.py tests/unit/statistics)
specs=("$@")
if [ $# = 0 ]; then specs=('torch==2.13.0 transformers==5.6.*' 'torch==2.13.0 transformers' 'torch transformers'); fi

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
bash tools/setup_env.sh || exit $?
status=0
for spec in "${specs[@]}"; do
    rm -rf .venv-try
    .venv/bin/python -m venv .venv-try
    pip=(.venv-try/bin/python -m pip install --quiet --disable-pip-version-check)
    # shellcheck disable=SC2086  # several requirements
    if ! { "${pip[@]}" $spec && "${pip[@]}" --editable '.[dev,quickstart,eval]' $spec; }; then
        echo "== $spec: could not be installed"
        status=1
        continue
    fi
    .venv-try/bin/python -m pip list 2>/dev/null | grep -E '^(torch|transformers|tokenizers|megatron-core|huggingface_hub) '
    if .venv-try/bin/python -m pytest -q -n 2 --dist loadfile "${TESTS[@]}"; then
        echo "== $spec: passed"
    else
        echo "== $spec: FAILED"
        status=1
    fi
done
rm -rf .venv-try
exit $status
