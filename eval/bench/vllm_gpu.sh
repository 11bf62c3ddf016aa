#!/usr/bin/env bash
# Tests the vLLM connector on CUDA, then runs `blocktune bench vllm`. Needs vLLM (VLLM_VENV).
# So far it is tested only on CPUs. Untested until this script has run: paged layouts on CUDA
# (FlashAttention, FlashInfer, Triton), the V2 model runner, CUDA graphs, loading on a separate
# stream with a forward pass that waits by layer, vLLM's rotary kernel in float32, and speed.
#
#   VLLM_VENV=/opt/vllm bash eval/bench/vllm_gpu.sh [OUTPUT.json]
set -euo pipefail
cd "$(dirname "$0")/../.."

python="${VLLM_VENV:-.venv-vllm}/bin/python"
export PYTHONPATH="$PWD"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "no CUDA device here; on a CPU run: make test-vllm" >&2
  exit 2
}
for runner in 1 0; do # the V2 and the V1 model runner
  VLLM_USE_V2_MODEL_RUNNER=$runner "$python" -m pytest -q tests/vllm
done
exec "$python" -m blocktune.cli bench vllm --json --output "${1:-out/vllm_gpu.json}"
