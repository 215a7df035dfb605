#!/usr/bin/env bash
# An exported directory behind OpenAI's chat API, by plain transformers: pip install 'dots-align[serve]'
#   MODEL=runs/tiny/export PORT=8000 recipes/deploy/transformers_serve.sh [options of `transformers serve`]
set -euo pipefail
: "${MODEL:?is not set; give an exported directory}"
exec "${PYTHON:-python}" -m transformers.cli.transformers serve "$(realpath "$MODEL")" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"
