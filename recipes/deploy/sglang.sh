#!/usr/bin/env bash
# An exported directory behind OpenAI's API, by SGLang's Transformers back end; see README.md here.
#   MODEL=exports/dots PORT=30000 GPUS=8 recipes/deploy/sglang.sh [options of the server]
set -euo pipefail
: "${MODEL:?is not set; give an exported directory}"
exec "${PYTHON:-python}" -m sglang.launch_server --model-path "$(realpath "$MODEL")" --model-impl transformers \
    --dtype bfloat16 --tp "${GPUS:-1}" --host "${HOST:-127.0.0.1}" --port "${PORT:-30000}" "$@"
