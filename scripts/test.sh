#!/usr/bin/env bash
# Installs what is needed, then runs the tests. Arguments go to pytest: scripts/test.sh tests/unit -k packing
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

scripts/setup_env.sh
export PATH="$ROOT/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

[ "$#" -gt 0 ] || set -- tests
exec python -m pytest "$@"
