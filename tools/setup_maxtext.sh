#!/usr/bin/env bash
# Makes .venv-maxtext: MaxText with JAX on Python 3.12, apart from everything else; does nothing when it is up to date.
# JAX_SPEC adds the part of JAX for an accelerator, e.g. JAX_SPEC='jax[tpu]==0.11.1' on a TPU VM.
# Exit status 3: there is no Python 3.12 on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/find_python.sh

JAX_SPEC=${JAX_SPEC:-}

stamp=$(cat tools/setup_maxtext.sh tools/maxtext_requirements.txt <(echo "$JAX_SPEC $PWD") | sha256sum | cut -d' ' -f1)
if [ -x .venv-maxtext/bin/python ] && [ "$(cat .venv-maxtext/stamp 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
if ! [ -x .venv-maxtext/bin/python ]; then
    python=$(python_of 3.12)
    if [ -z "$python" ]; then
        echo "setup_maxtext: no Python 3.12 found (MaxText needs it); install one and run this again" >&2
        exit 3
    fi
    "$python" -m venv .venv-maxtext
fi

echo "setup_maxtext: installing into .venv-maxtext (once; a few minutes, 0.9 GB)"
rm -f .venv-maxtext/stamp
install() { .venv-maxtext/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
install --no-deps --requirement tools/maxtext_requirements.txt
if [ -n "$JAX_SPEC" ]; then install --constraint tools/maxtext_requirements.txt "$JAX_SPEC"; fi
echo "$PWD" > "$(.venv-maxtext/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/megatron_prune.pth"
echo "$stamp" > .venv-maxtext/stamp
