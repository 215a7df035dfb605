#!/usr/bin/env bash
# From a fresh checkout to a trained, evaluated and exported tiny dots1 model: installs what is needed, then runs the whole
# pipeline on a CPU. Arguments go to `dots-align pipeline` (key=value overrides, for example).
#
#   scripts/quickstart.sh
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

took() { printf '%d min %02d s' "$(($1 / 60))" "$(($1 % 60))"; }

scripts/setup_env.sh
setup=$SECONDS

export PATH="$ROOT/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # nothing is downloaded: the model starts from random weights

# torch takes a thread per core it sees, but a container limited to 2 CPUs still sees the host's 64.
if [ -z "${OMP_NUM_THREADS:-}" ] && [ -r /sys/fs/cgroup/cpu.max ]; then
    read -r quota period </sys/fs/cgroup/cpu.max
    if [ "$quota" != max ] && [ "$((quota / period))" -lt "$(nproc)" ]; then
        export OMP_NUM_THREADS="$((quota >= period ? quota / period : 1))"
    fi
fi

status=0
dots-align pipeline recipes/tiny/pipeline.yaml "$@" || status=$?
if [ "$status" -ne 0 ]; then
    echo "quickstart: the pipeline failed (exit $status) after $(took "$SECONDS")" >&2
    exit "$status"
fi
echo "quickstart: $(took "$SECONDS") in all (set-up $(took "$setup"), pipeline $(took "$((SECONDS - setup))"))"
