#!/usr/bin/env bash
# Runs the study on one GPU. Each step can be repeated alone, and continues where it stopped.
#
#   bash eval/real/gpu.sh DATA                      # all steps
#   bash eval/real/gpu.sh DATA base choice          # some of them
#   GGUF=SmolLM2-135M-Instruct.Q4_1.gguf bash eval/real/gpu.sh DATA    # without access to the Hub
#   OUT=out/llama MODEL=meta-llama/Llama-3.1-8B-Instruct bash eval/real/gpu.sh DATA
#   SETTINGS=dry bash eval/real/gpu.sh DATA         # a small test run of every step, on a CPU
#
# Prints the seconds of each step, and appends them to seconds.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."

data="${1:?folder of the data sets, see eval/real/README.md}"
shift
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
out="${OUT:-out/real}"
settings="${SETTINGS:-gpu}"
options=(--settings "$settings" --data "$data" --output "$out" --jobs "${JOBS:-6}")
if [ -n "${GGUF:-}" ]; then
  options+=(--gguf "$GGUF" --model "${MODEL:-out/smollm2}")
elif [ -n "${MODEL:-}" ]; then
  options+=(--model "$MODEL")
fi
[ "$settings" = dry ] && options+=(--results "$out/results")
[ $# -gt 0 ] || set -- prepare base choice tune test long place report
for step in "$@"; do
  start=$SECONDS
  "$python" eval/real/study.py "$step" "${options[@]}"
  echo "$step: $((SECONDS - start)) s" | tee -a "$out/seconds.txt"
done
