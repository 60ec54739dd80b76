#!/usr/bin/env bash
# One step of the recipe on this host, or on every host of a slice at the same time: run.sh convert|learn|train|verify|export
# [flags of the verb]. What it reads and writes is under $ROOT, which all hosts see (Filestore, or gcsfuse).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

ROOT=${ROOT:-runs/tpu}
HF=${HF:-$ROOT/hf}           # Hugging Face directory to start from
DATA=${DATA:-$ROOT/tokens}   # prefix from `megatron-prune preprocess`, with --append-eod
LENGTH=${LENGTH:-4096}
FSDP=${FSDP:--1}             # chips over which weights are sharded; -1: all of a slice
SLICES=${SLICES:-1}          # slices, each with a copy of the weights
PER_DEVICE=${PER_DEVICE:-1}  # windows on a chip in an optimizer step

python=${MEGATRON_PRUNE_MAXTEXT_PYTHON:-.venv-maxtext/bin/python}
verb() { exec "$python" -m megatron_prune.maxtext "$@"; }
settings=("ici_fsdp_parallelism=$FSDP" "dcn_data_parallelism=$SLICES")
read -ra more <<< "${MORE:-}"  # more of MaxText's settings, KEY=VALUE ...

step=${1:?usage: run.sh convert|learn|train|verify|export [flags]}
shift
case $step in
    convert) verb convert --input "$HF" --output "$ROOT/dense" "$@" ;; # on one host
    learn)
        verb learn --input "$ROOT/dense" --output "$ROOT/learned" --data "$DATA" --seq-length "$LENGTH" \
            --config examples/tpu/learn.yaml "$@" --settings "${settings[@]}" weight_dtype=bfloat16 "${more[@]}" ;;
    sparse) verb convert --input "$HF" --masks "$ROOT/learned/masks.npz" --output "$ROOT/sparse" "$@" ;; # on one host
    train)
        verb train --input "$ROOT/sparse" --output "${OUTPUT:-$ROOT/trained}" --data "$DATA" --seq-length "$LENGTH" \
            --steps "${STEPS:-2000}" "$@" --settings "${settings[@]}" "per_device_batch_size=$PER_DEVICE" \
            learning_rate=1e-5 remat_policy=full "${more[@]}" ;;
    verify) verb verify --input "$ROOT/sparse" --checkpoint "$ROOT/trained" "$@" ;; # on one host
    export) verb export --input "$ROOT/sparse" --checkpoint "$ROOT/trained" --output "$ROOT/trained_hf" "$@" ;; # on one host
    *) echo "run.sh: unknown step $step" >&2; exit 2 ;;
esac
