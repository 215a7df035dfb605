#!/usr/bin/env bash
# Installs what is needed, then lint, format, types and layers. All four run; the last line names those that failed.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

scripts/setup_env.sh
export PATH="$ROOT/.venv/bin:$PATH"
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # no look for a newer pyright

failed=()
check() {
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "pyright" pyright
check "lint-imports" lint-imports --no-logo

if [ "${#failed[@]}" -gt 0 ]; then
    printf -v names '%s, ' "${failed[@]}"
    echo "check: FAILED: ${names%, }"
    exit 1
fi
echo "check: all passed"
