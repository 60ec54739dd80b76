#!/usr/bin/env bash
# Every linter over every file that it reads, all of them even when one complains. A word picks one: tools/lint.sh ruff
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

status=0
wanted=${1:-}
check() {
    [ -z "$wanted" ] || [ "$wanted" = "$1" ] || return 0
    echo "== $*"
    ".venv/bin/$1" "${@:2}" || status=1
}
mapfile -t scripts < <(find .ci/run tools tests examples docker -name '*.sh' -o -name '*.sbatch' -o -path .ci/run | sort)

check ruff check .
check ruff format --check .
check mypy
check lint-imports
check shellcheck "${scripts[@]}"
check yamllint .
check hadolint docker/Dockerfile docker/Dockerfile.cpu docker/Dockerfile.tpu
check kubernetes-validate --strict docker/kubernetes.yaml examples/tpu/gke.yaml
exit $status
