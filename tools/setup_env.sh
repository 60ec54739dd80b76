#!/usr/bin/env bash
# Makes .venv with everything that the tests and the quickstart need; does nothing when it is up to date.
# TORCH_SPEC chooses another PyTorch, e.g. TORCH_SPEC='torch==2.13.0 --index-url URL-OF-A-CUDA-BUILD'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# PyTorch goes first, so that nothing else chooses its version: this is the CPU build where the package index offers
# one; on other indexes it is the default build, which also runs without a GPU but is several times larger.
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

stamp=$(cat setup.py tools/setup_env.sh <(echo "$TORCH_SPEC $PWD") | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

if ! [ -x .venv/bin/python ]; then
    python=
    for candidate in python3.11 python3 python3.12 python3.13; do
        if is_new_enough "$candidate"; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then
        echo "setup_env: no Python 3.11 or newer found; install one and run this again" >&2
        exit 2
    fi
    "$python" -m venv .venv
fi

echo "setup_env: installing into .venv (once; a few minutes)"
rm -f .venv/stamp
# shellcheck disable=SC2086  # TORCH_SPEC may hold options
.venv/bin/python -m pip install --quiet $TORCH_SPEC
.venv/bin/python -m pip install --quiet -e '.[dev,quickstart,eval]'
echo "$stamp" > .venv/stamp
