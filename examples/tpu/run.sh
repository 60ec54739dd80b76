#!/usr/bin/env bash
# One step of the recipe on this host, or on every host of a slice at the same time: run.sh STEP [flags of its verb].
# What it reads and writes is under $ROOT, which all hosts see (Filestore, or gcsfuse).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

ROOT=${ROOT:-runs/tpu}
HF=${HF:-$ROOT/hf}           # Hugging Face directory to start from
DATA=${DATA:-$ROOT/tokens}   # prefix from `megatron-prune preprocess`, with --append-eod
MODEL=${MODEL:-$ROOT/sparse} # model for MaxText that is trained; also from `megatron-prune export --format maxtext`
OUTPUT=${OUTPUT:-$ROOT/trained}
TEACHER=${TEACHER:-}         # model for MaxText that `train` learns from; empty: from the text alone
STEPS=${STEPS:-2000}
LENGTH=${LENGTH:-4096}
FSDP=${FSDP:--1}             # chips over which weights are sharded; -1: all of a slice
SLICES=${SLICES:-1}          # slices, each with a copy of the weights
PER_DEVICE=${PER_DEVICE:-1}  # windows on a chip in an optimizer step

python=${MEGATRON_PRUNE_MAXTEXT_PYTHON:-.venv-maxtext/bin/python}
verb() { exec "$python" -m megatron_prune.maxtext "$@"; }
ordinary() { exec "${MEGATRON_PRUNE_PYTHON:-.venv/bin/python}" -m megatron_prune "$@"; }
settings=("ici_fsdp_parallelism=$FSDP" "dcn_data_parallelism=$SLICES")
read -ra more <<< "${MORE:-}"  # more of MaxText's settings, KEY=VALUE ...

# The number of this host, as GKE and TPU VMs know it: of several hosts that evaluate the first writes the result.
host() {
    local slice=${MEGASCALE_SLICE_ID:-0} hosts=${TPU_WORKER_HOSTNAMES:-} number=${TPU_WORKER_ID:-}
    local metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
    if [ -z "$number" ]; then
        number=$(curl --silent --fail --max-time 2 --header 'Metadata-Flavor: Google' "$metadata" || echo 0)
    fi
    hosts=${hosts//[^,]/}
    echo $((slice * (${#hosts} + 1) + number))
}

step=${1:?usage: run.sh convert|learn|sparse|train|verify|export|evaluate [flags]}
shift
case $step in
    convert) verb convert --input "$HF" --output "$ROOT/dense" "$@" ;; # on one host
    learn)
        verb learn --input "$ROOT/dense" --output "$ROOT/learned" --data "$DATA" --seq-length "$LENGTH" \
            --config examples/tpu/learn.yaml "$@" --settings "${settings[@]}" weight_dtype=bfloat16 "${more[@]}" ;;
    sparse) verb convert --input "$HF" --masks "$ROOT/learned/masks.npz" --output "$ROOT/sparse" "$@" ;; # on one host
    train)
        if [ -n "$TEACHER" ]; then set -- --teacher "$TEACHER" "$@"; fi
        verb train --input "$MODEL" --output "$OUTPUT" --data "$DATA" --seq-length "$LENGTH" \
            --steps "$STEPS" "$@" --settings "${settings[@]}" "per_device_batch_size=$PER_DEVICE" \
            learning_rate=1e-5 remat_policy=full "${more[@]}" ;;
    verify) verb verify --input "$MODEL" --checkpoint "$OUTPUT" "$@" ;; # on one host
    export) verb export --input "$MODEL" --checkpoint "$OUTPUT" --output "${OUTPUT}_hf" "$@" ;; # on one host
    evaluate) # --text FILE, or --tasks NAME ...
        RANK=${RANK:-$(host)}
        export RANK
        ordinary evaluate --input "$MODEL" --checkpoint "$OUTPUT" "$@" --settings "${settings[@]}" "${more[@]}" ;;
    *) echo "run.sh: unknown step $step" >&2; exit 2 ;;
esac
