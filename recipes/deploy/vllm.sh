#!/usr/bin/env bash
# An exported directory behind OpenAI's API, by vLLM's Transformers back end; which versions: see README.md here.
#   MODEL=exports/dots PORT=8000 GPUS=8 recipes/deploy/vllm.sh [options of `vllm serve`]
set -euo pipefail
: "${MODEL:?is not set; give an exported directory}"
# Not float16: routed experts overflow it. --model-impl: what computes is then the forward that parity has proven.
exec vllm serve "$(realpath "$MODEL")" --model-impl transformers --dtype bfloat16 \
    --tensor-parallel-size "${GPUS:-1}" --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"
