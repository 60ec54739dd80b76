#!/usr/bin/env bash
# LLaMA-2 7B, 2:4 with learned masks: launch.sh STEP [options] [-- flags]; see README.md here and examples/step.sh.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/../step.sh" llama2_7b_maskllm "${HUB:-meta-llama/Llama-2-7b-hf}" "$@"
