#!/usr/bin/env bash
# One step of an example, on this node: from a Hugging Face model to a 2:4 one with learned masks.
#
#     examples/NAME/launch.sh STEP [options of tools/launch.sh] [-- flags of the verb]
#
#     import      $HUB, a Hugging Face id or directory     -> runs/NAME/dense, in bfloat16
#     preprocess  $C4/c4-train.*.json.gz                   -> runs/NAME/c4.bin and .idx, on this node's processors
#     prior       SparseGPT on the first of those files    -> runs/NAME/prior
#     learn       masks, from the prior, on the tokens     -> runs/NAME/learned; start it again to go on
#     trim        zeros where the masks say so             -> runs/NAME/sparse
#     export      Hugging Face format                      -> runs/NAME/hf
#     evaluate    perplexity of runs/NAME/hf on $TEXT      -> runs/NAME/perplexity.json
#
# C4 is a folder (left out: data/c4), TEXT a file (left out: data/wiki.test.txt), RUNS the folder of results (left out:
# runs). All of them, and this repository, lie where every node sees them.
set -euo pipefail

fail() { echo "launch: $*" >&2; exit 2; }

example=$1 HUB=$2
shift 2
steps="import preprocess prior learn trim export evaluate"
[ $# -gt 0 ] || fail "no step was given; allowed: $steps"
step=$1
shift

options=()
while [ $# -gt 0 ]; do
    case $1 in
        --) shift; break ;;
        *) options+=("$1"); shift ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipes=$root/examples/$example
runs=${RUNS:-runs}/$example
c4=${C4:-data/c4}
alone=(--nproc-per-node 1)
case $step in
    import) verb=(import --input "$HUB" --output "$runs/dense" --dtype bfloat16) ;;
    preprocess) verb=(preprocess --input "$c4"/c4-train.*.json.gz --tokenizer "$runs/dense/tokenizer" --append-eod
        --output "$runs/c4") ;;
    prior) alone=(); verb=(prune --config "$recipes/prior.yaml" --input "$runs/dense" --output "$runs/prior"
        --calibration "$c4/c4-train.00000-of-01024.json.gz") ;;
    learn) alone=(); verb=(prune --config "$recipes/learn.yaml" --input "$runs/dense" --output "$runs/learned"
        --prior "$runs/prior" --data "$runs/c4" --data-cache "$runs/c4_cache" --restartable) ;;
    trim) verb=(trim --input "$runs/learned" --output "$runs/sparse") ;;
    export) verb=(export --input "$runs/sparse" --output "$runs/hf" --format hf) ;;
    evaluate) verb=(evaluate --input "$runs/hf" --text "${TEXT:-data/wiki.test.txt}" --window 4096 --windows 0
        --output "$runs/perplexity.json") ;;
    *) fail "step $step was given; allowed: $steps" ;;
esac
exec "$root/tools/launch.sh" "${alone[@]}" "${options[@]}" "${verb[@]}" "$@"
