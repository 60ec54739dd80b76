#!/usr/bin/env bash
# Makes .venv-maxtext: MaxText with JAX on Python 3.12, apart from everything else; does nothing when it is up to date.
# JAX_SPEC chooses another build, e.g. JAX_SPEC='jax[tpu]==0.11.1' on a TPU VM, 'jax[cuda12]==0.11.1' on a GPU.
# Exit status 3: there is no Python 3.12 on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

JAX_SPEC=${JAX_SPEC:-jax==0.11.1}

is_3_12() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

python_3_12() {
    local candidate
    for candidate in python3.12 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
        if is_3_12 "$candidate"; then echo "$candidate"; return; fi
    done
    if command -v uv > /dev/null; then uv python find 3.12 2>/dev/null; fi
}

stamp=$(cat tools/setup_maxtext.sh tools/maxtext_constraints.txt <(echo "$JAX_SPEC $PWD") | sha256sum | cut -d' ' -f1)
if [ -x .venv-maxtext/bin/python ] && [ "$(cat .venv-maxtext/stamp 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
if ! [ -x .venv-maxtext/bin/python ]; then
    python=$(python_3_12) || true
    if [ -z "$python" ]; then
        echo "setup_maxtext: no Python 3.12 found (MaxText needs it); install one and run this again" >&2
        exit 3
    fi
    "$python" -m venv .venv-maxtext
fi

echo "setup_maxtext: installing into .venv-maxtext (once; a few minutes, 1.1 GB)"
rm -f .venv-maxtext/stamp
install() { .venv-maxtext/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
# The wheel names no dependencies; these are what its trainer imports. PyTorch and TensorFlow are not among them.
install --no-deps maxtext==0.2.5
install --constraint tools/maxtext_constraints.txt "$JAX_SPEC" flax optax orbax-checkpoint omegaconf pydantic jinja2 \
    pathwaysutils aqtp qwix tokamax grain drjax transformers huggingface_hub ml_collections pillow tiktoken \
    sentencepiece sympy jsonargparse
install --no-deps -e .
echo "$stamp" > .venv-maxtext/stamp
