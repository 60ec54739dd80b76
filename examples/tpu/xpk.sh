#!/usr/bin/env bash
# Submit one step to a GKE cluster that xpk manages: xpk.sh STEP. Each host of each slice runs examples/tpu/run.sh STEP.
set -euo pipefail

STEP=${1:?usage: xpk.sh learn|train}
: "${CLUSTER:?name of the cluster}" "${IMAGE:?image from docker/Dockerfile.tpu in a registry that the cluster reads}"
TPU_TYPE=${TPU_TYPE:-v5litepod-16} # 16 chips on 4 hosts
SLICES=${SLICES:-1}
ROOT=${ROOT:?folder that all hosts see, mounted by the cluster (xpk storage attach)}

exec xpk workload create --cluster "$CLUSTER" --workload "prune-$STEP" --tpu-type "$TPU_TYPE" --num-slices "$SLICES" \
    --docker-image "$IMAGE" --max-restarts 10 \
    --command "ROOT=$ROOT SLICES=$SLICES examples/tpu/run.sh $STEP"
