#!/usr/bin/env bash
# Loads exports of the presets tiny and small (or of the checkpoints given) with several releases of transformers, each in
# an environment of its own, and compares their logits, experts, rendered prompts and stop tokens with the definition.
#
#   scripts/check_export_matrix.sh [CHECKPOINT...]
#   VERSIONS="4.57.6 5.10.4 5" scripts/check_export_matrix.sh      # a single digit: the newest of that line
#
# The environments lie in $MATRIX_DIR (build/export_matrix) and are kept: about 100 MB each, as torch is shared with .venv.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
matrix=${MATRIX_DIR:-build/export_matrix}
read -ra versions <<<"${VERSIONS:-4.57.6 5.10.4 5}"
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
interpreters=()
for version in "${versions[@]}"; do
    environment="$matrix/transformers-$version"
    if [ ! -f "$environment/.done" ]; then
        "$python" -m venv --clear --without-pip "$environment"
        # What is not installed here (torch, numpy, safetensors) is found there, after what is.
        echo "$site" >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
        case $version in
        *.*) wanted="transformers==$version" ;;
        *) wanted="transformers==$version.*" ;;
        esac
        # pip's complaints that the shared packages want another transformers are beside the point.
        "$python" -m pip --python "$environment/bin/python" install --quiet --upgrade "$wanted" 2>"$environment/pip.log" ||
            { cat "$environment/pip.log" >&2 && exit 1; }
        touch "$environment/.done"
    fi
    interpreters+=("$PWD/$environment/bin/python")
    [[ $matrix != /* ]] || interpreters[-1]="$environment/bin/python"
done

checkpoints=("$@")
if [ ${#checkpoints[@]} -eq 0 ]; then
    "$python" scripts/make_checkpoint.py tiny "$matrix/tiny"
    "$python" scripts/make_checkpoint.py small "$matrix/small"
    checkpoints=("$matrix/tiny" "$matrix/small")
fi
failed=0
for checkpoint in "${checkpoints[@]}"; do
    "$python" -m dots_align parity "$checkpoint" --python "${interpreters[@]}" || failed=1
    echo
done
exit "$failed"
