#!/usr/bin/env bash
# All checks: lint, format, types, tests. Arguments go to pytest, e.g. tests/run.sh tests/unit -k wanda
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh || exit $?
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

lint=0
check() { echo "== $*"; .venv/bin/python -m "$@" || lint=1; }
check ruff check .
check ruff format --check .
check mypy

echo "== pytest"
if [ $lint -ne 0 ]; then
    echo "(lint, format or types failed above: this run fails whatever the tests say)"
fi
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
status=$?
[ $status -ne 0 ] && exit $status
exit $lint
