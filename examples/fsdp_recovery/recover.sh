#!/usr/bin/env bash
# Recovers a pruned Hugging Face model with FSDP2, on this node and on the others that run the same:
#
#     examples/fsdp_recovery/recover.sh PRUNED TEACHER DATA OUTPUT [options of tools/launch.sh] [-- flags of train]
#
# PRUNED and TEACHER are Hugging Face directories, DATA a prefix from `preprocess` or a file of text, OUTPUT the run
# folder. All lie where every node sees them. Started again, it goes on.
set -euo pipefail

usage="recover.sh PRUNED TEACHER DATA OUTPUT [options of tools/launch.sh] [-- flags of train]"
if [ $# -lt 4 ]; then
    echo "recover: $# words were given; allowed: $usage" >&2
    exit 2
fi
pruned=$1 teacher=$2 data=$3 output=$4
shift 4

options=()
while [ $# -gt 0 ]; do
    case $1 in
        --) shift; break ;;
        *) options+=("$1"); shift ;;
    esac
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$here/../../tools/launch.sh" "${options[@]}" train --config "$here/recover.yaml" --restartable \
    --input "$pruned" --teacher "$teacher" --data "$data" --output "$output" "$@"
