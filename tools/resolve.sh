#!/usr/bin/env bash
# Whether one environment can hold this package, Megatron-Bridge and nvidia-modelopt: a dry run that installs nothing but
# uv, in a temporary folder, and prints the versions that go together. Exit status 1 when none do.
#
#     tools/resolve.sh [REQUIREMENT ...]       others in place of 'megatron-bridge>=0.6' nvidia-modelopt
#
# Python 3.12, which Megatron-Bridge 0.6 demands, on x86-64 Linux with glibc 2.39, which its dependencies do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=("$@")
if [ $# = 0 ]; then wanted=('megatron-bridge>=0.6' nvidia-modelopt); fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
uv=uv
if ! command -v uv > /dev/null; then
    python3 -m venv "$folder/uv"
    "$folder/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
    uv=$folder/uv/bin/uv
fi

printf '%s\n' "-e .[eval]" "${wanted[@]}" > "$folder/wanted.txt"
"$uv" pip compile --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_39 \
    --output-file "$folder/found.txt" "$folder/wanted.txt" > /dev/null
grep -E '^(megatron|nvidia-modelopt|torch|transformers|transformer-engine|datasets|numpy|tokenizers)[a-z-]*==' "$folder/found.txt"
