#!/usr/bin/env bash
# Makes .venv with everything that the tests and the quickstart need; does nothing when it is up to date.
# The newest Python from 3.11 to 3.13 is taken that is here: on PATH, pyenv's or uv's. With a version, as in
# `tools/setup_env.sh 3.11`, it is that Python, in .venv-3.11; exit status 3 when there is none.
# TORCH_SPEC chooses another PyTorch, e.g. TORCH_SPEC='torch==2.13.0 --index-url URL-OF-A-CUDA-BUILD'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/find_python.sh

# PyTorch goes first, so that nothing else chooses its version: this is the CPU build where the package index offers
# one; on other indexes it is the default build, which also runs without a GPU but is several times larger.
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}
VERSIONS=(3.13 3.12 3.11)
folder=.venv
if [ $# -gt 0 ]; then VERSIONS=("$1") folder=.venv-$1; fi

# Of pyproject.toml what is installed, not the settings of the tools.
stamp=$(cat <(sed '/^\[tool\.ruff/,$d' pyproject.toml) tools/setup_env.sh <(echo "$TORCH_SPEC $PWD") | sha256sum | cut -d' ' -f1)
if [ -x "$folder"/bin/python ] && [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

if ! [ -x "$folder"/bin/python ]; then
    python=
    for version in "${VERSIONS[@]}"; do
        python=$(python_of "$version")
        if [ -n "$python" ]; then break; fi
    done
    if [ -z "$python" ]; then
        echo "setup_env: no Python ${VERSIONS[*]} found (PATH, pyenv, uv); install one and run this again" >&2
        exit $(($# > 0 ? 3 : 2))
    fi
    "$python" -m venv "$folder"
fi

echo "setup_env: installing into $folder ($("$folder/bin/python" --version); once; a few minutes)"
rm -f "$folder"/stamp
# shellcheck disable=SC2086  # TORCH_SPEC may hold options
"$folder"/bin/python -m pip install --quiet --disable-pip-version-check $TORCH_SPEC
"$folder"/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,quickstart,eval]'
echo "$stamp" > "$folder"/stamp
