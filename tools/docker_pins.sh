#!/usr/bin/env bash
# The pip steps of both Dockerfiles in fresh environments of Python 3.12, as far as a machine without Docker and GPUs can:
# the CPU image's with the pins of docker/constraints.txt; the GPU image's, as its Dockerfile has them, over what of its
# base is on PyPI (PyTorch, NumPy, nvidia-modelopt), since Transformer Engine and Apex are built there.
#
# The CPU image has PyTorch's CPU build, PyPI's asks for a Triton of its own: without TORCH_SPEC, as in the Dockerfile, that
# one pin is left out.
#
#     tools/docker_pins.sh [cpu] [gpu]        left out: both
#
# Everything is made in a temporary folder and removed. Exit status 1 when a step fails, 3 without Python 3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/find_python.sh

python=$(python_of 3.12)
if [ -z "$python" ]; then
    echo "docker_pins: no Python 3.12 found (PATH, pyenv, uv)" >&2
    exit 3
fi
images=("$@")
if [ $# = 0 ]; then images=(cpu gpu); fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/tree"
git ls-files -z | xargs -0 cp --parents --target-directory "$folder/tree"
cd "$folder/tree"
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# As in docker/Dockerfile.cpu, whose Python is the only one there.
cpu() {
    local pins=docker/constraints.txt
    if [ -z "${TORCH_SPEC:-}" ]; then grep -v '^triton==' $pins > "$folder/pins.txt"; else cp $pins "$folder/pins.txt"; fi
    PIP_CONSTRAINT=$folder/pins.txt tools/setup_env.sh 3.12
    .venv-3.12/bin/python -m pip check
    .venv-3.12/bin/megatron-prune methods > /dev/null
    .venv-3.12/bin/python -m pytest -q tests/unit/examples/test_containers.py tests/unit/test_backend.py
}

# As in docker/Dockerfile, whose lines are read from it.
gpu() {
    local keep asked
    keep=$(sed -n 's/^ENV KEEP="\(.*\)"$/\1/p' docker/Dockerfile)
    asked=$(sed -n "s/^RUN pip install \(.*\) .$/\1/p" docker/Dockerfile | tr -d "'")
    if [ -z "$keep" ] || [ -z "$asked" ]; then echo "docker_pins: docker/Dockerfile is written otherwise" >&2; exit 1; fi
    "$python" -m venv "$folder/gpu"
    PATH=$folder/gpu/bin:$PATH
    pip install --quiet 'torch==2.10.*' numpy nvidia-modelopt
    pip list --format=freeze | grep -iE "$keep" | tee "$folder/kept.txt"
    # shellcheck disable=SC2086  # several requirements
    PIP_CONSTRAINT=$folder/kept.txt pip install --quiet $asked
    pip list --format=freeze | grep -iE "$keep" | diff "$folder/kept.txt" -
    pip check
    megatron-prune methods > /dev/null
    python3 -c 'import megatron_prune.backend, lm_eval'
    python3 -m pytest -q tests/unit/test_backend.py tests/unit/kernels/test_selection.py
}

for image in "${images[@]}"; do
    echo "== $image"
    "$image"
    echo "== $image: passed"
done
