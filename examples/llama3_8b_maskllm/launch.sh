#!/usr/bin/env bash
# LLaMA-3 8B, 2:4 with learned masks: launch.sh STEP [options] [-- flags]; see README.md here and examples/step.sh.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/../step.sh" llama3_8b_maskllm "${HUB:-meta-llama/Meta-Llama-3-8B}" "$@"
