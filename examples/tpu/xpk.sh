#!/usr/bin/env bash
# Submit one step to a GKE cluster that xpk manages: xpk.sh STEP [flags]. Each host of each slice runs
# examples/tpu/run.sh STEP [flags], with every variable of run.sh that is set here.
set -euo pipefail

STEP=${1:?usage: xpk.sh learn|train|evaluate [flags]}
: "${CLUSTER:?name of the cluster}" "${IMAGE:?image from docker/Dockerfile.tpu in a registry that the cluster reads}"
: "${ROOT:?folder that all hosts see, mounted by the cluster (xpk storage attach)}"
TPU_TYPE=${TPU_TYPE:-v5litepod-16} # 16 chips on 4 hosts
SLICES=${SLICES:-1}

command=
for name in ROOT HF DATA MODEL OUTPUT TEACHER STEPS LENGTH FSDP SLICES PER_DEVICE MORE; do
    if [ -n "${!name+set}" ]; then command+="$name=$(printf %q "${!name}") "; fi
done
command+="examples/tpu/run.sh$(printf ' %q' "$@")"

exec xpk workload create --cluster "$CLUSTER" --workload "prune-$STEP" --tpu-type "$TPU_TYPE" --num-slices "$SLICES" \
    --docker-image "$IMAGE" --max-restarts 10 --command "$command"
