#!/usr/bin/env bash
# All checks: lint, format, types, tests. Arguments go to pytest, e.g. tests/run.sh tests/unit -k wanda
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
bash tools/setup_env.sh || exit $?
bash tools/setup_maxtext.sh || [ $? -eq 3 ] || exit 1 # without Python 3.12 its tests say that they are skipped
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

lint=0
bash tools/lint.sh || lint=1

echo "== pytest"
if [ $lint -ne 0 ]; then
    echo "(a linter failed above: this run fails whatever the tests say)"
fi
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
status=$?
[ $status -ne 0 ] && exit $status
exit $lint
