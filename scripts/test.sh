#!/usr/bin/env bash
# Installs what is needed, then runs the tests. Arguments go to pytest: scripts/test.sh tests/unit -k packing
# Without any it runs all of them, in as many processes as there are cores (or as DOTS_ALIGN_TEST_PROCESSES says).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

scripts/setup_env.sh
export PATH="$ROOT/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ "$#" -eq 0 ]; then
    # A file stays in one process, for what its tests share; in order, because the long files come first.
    processes="${DOTS_ALIGN_TEST_PROCESSES:-$(getconf _NPROCESSORS_ONLN)}"
    set -- --numprocesses "$processes" --dist loadfile --no-loadscope-reorder tests
fi
exec python -m pytest "$@"
