#!/usr/bin/env bash
# A GGUF file behind OpenAI's API, by llama.cpp: its own llama-server where that is installed, else the one of its Python
# binding: pip install 'dots-align[llama,serve]'
#   MODEL=runs/tiny/export/model-Q8_0.gguf PORT=8080 recipes/deploy/llama_cpp_server.sh [options of the server]
set -euo pipefail
: "${MODEL:?is not set; give a GGUF file}"
where=(--host "${HOST:-127.0.0.1}" --port "${PORT:-8080}" --model "$MODEL")
if command -v llama-server >/dev/null; then
    exec llama-server "${where[@]}" --jinja "$@" # --jinja: the template in the file
fi
# 0: the model's whole context. It keeps the logits of every position, so that it can tell the log-probs of a prompt.
exec "${PYTHON:-python}" -m llama_cpp.server "${where[@]}" --n_ctx "${CONTEXT:-0}" --logits_all true "$@"
