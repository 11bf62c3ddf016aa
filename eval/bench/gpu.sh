#!/usr/bin/env bash
# Runs the GPU tests, then measures attention, a training step and cached answers with the layers of
# Llama 3.1 8B and random weights. Writes one JSON file under eval/results/gpu/.
#
#   bash eval/bench/gpu.sh                    # everything, on one GPU, with 8 layers
#   bash eval/bench/gpu.sh --layers 32        # the full depth
#   bash eval/bench/gpu.sh --tiny --output F  # the same code on a CPU, in seconds (CI runs this)
set -euo pipefail
cd "$(dirname "$0")/../.."

python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
case " $* " in
  *" --tiny "*) device=cpu ;;
  *) device=cuda ;;
esac
"$python" -m pytest -q tests/gpu --gpu-tests-on "$device"
exec "$python" eval/bench/gpu.py "$@"
