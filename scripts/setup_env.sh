#!/usr/bin/env bash
# Makes .venv in the repository root with the package (editable), its dev tools, TensorBoard and what verl's trainer
# needs, at the versions of constraints.txt. Run again it returns at once, until pyproject.toml or constraints.txt
# changes. The other scripts call it.
#
#   scripts/setup_env.sh                      # the first Python 3.11 or 3.12 that works
#   PYTHON=/path/to/python scripts/setup_env.sh
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
VENV="$ROOT/.venv"
STAMP="$VENV/.setup-done"            # what was installed (a hash) and for which directory
UNFINISHED="$VENV/.setup-unfinished" # there while half a package may be on disk
LOG="$VENV/setup.log"
PIP_PID=

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
export PIP_REQUIRE_VIRTUALENV=1 # whatever state .venv is in, the Python it was made from is never installed into

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# --- which Python

python_is_supported() { # also false for a shim that exists but does not run
    "$1" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12)))' >/dev/null 2>&1
}

python_version() { "$1" -c 'import platform; print(platform.python_version())'; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python_is_supported "$PYTHON" || die "PYTHON=$PYTHON does not run or is not Python 3.11 or 3.12"
        echo "$PYTHON"
        return
    fi
    local name path
    for name in python3.11 python3.12 python3 python; do
        while IFS= read -r path; do
            if python_is_supported "$path"; then
                echo "$path"
                return
            fi
        done < <(type -aP "$name" || true)
    done
    die "no working Python 3.11 or 3.12 on PATH: install one, or set PYTHON=/path/to/python3.11"
}

refuse_other_python() { # a PYTHON that differs from the .venv that is there is refused, not ignored
    [ -n "${PYTHON:-}" ] && [ ! -e "$UNFINISHED" ] && venv_runs || return 0
    local asked want have
    asked="$(find_python)"
    want="$(python_version "$asked")"
    have="$(python_version "$VENV/bin/python")"
    [ "${want%.*}" = "${have%.*}" ] || die ".venv has Python $have but PYTHON=$PYTHON is $want: remove .venv to change over"
}

# --- what state is .venv in

venv_runs() { # with its pyvenv.cfg gone, bin/python still runs, but is the Python it was made from
    python_is_supported "$VENV/bin/python" && "$VENV/bin/python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'
}

wanted() {
    local sha=(sha256sum)
    command -v sha256sum >/dev/null || sha=(shasum -a 256)
    printf '%s %s\n' "$(cat pyproject.toml constraints.txt | "${sha[@]}" | cut -d' ' -f1)" "$ROOT"
}

is_up_to_date() {
    [ -f "$STAMP" ] && [ ! -e "$UNFINISHED" ] && [ "$(cat "$STAMP")" = "$(wanted)" ] && venv_runs
}

why_remake() { # prints why the .venv that is there cannot be used; nothing if it can
    if [ -e "$UNFINISHED" ]; then
        echo "an earlier set-up was interrupted"
    elif ! venv_runs; then
        echo "its Python does not run as one of 3.11 or 3.12"
    elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "it has no pip"
    elif [ -f "$STAMP" ] && [ "$(cut -d' ' -f2- "$STAMP")" != "$ROOT" ]; then
        echo "it was made in another directory"
    fi
}

torch_is_there() {
    "$VENV/bin/python" -c 'import sys; from importlib.metadata import version
sys.exit(version("torch").split("+")[0] != sys.argv[1])' "${1#torch==}" 2>/dev/null
}

# --- making it

make_venv() {
    local python="$1" maker
    if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        maker=("$python" -m venv)
    elif command -v virtualenv >/dev/null; then
        maker=(virtualenv --quiet --python "$python")
    elif command -v uv >/dev/null; then
        maker=(uv venv --quiet --seed --allow-existing --python "$python")
    else
        die "$python has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv), or virtualenv, or uv"
    fi
    say "making .venv with Python $(python_version "$python") ($python)"
    [ -d "$VENV" ] || rm -f "$VENV"
    mkdir -p "$VENV"
    touch "$UNFINISHED" # first of all, and the last to go: a removal cut short must not pass for a .venv
    find "$VENV/" -mindepth 1 -maxdepth 1 ! -name "${UNFINISHED##*/}" -exec rm -rf {} +
    "${maker[@]}" "$VENV" || die "making .venv failed: ${maker[*]} $VENV"
}

pip_install() { # quiet: all output goes to $LOG, and its end to the screen if pip fails; a line every 20 s until it is done
    local status=0 seconds=0
    "$VENV/bin/python" -m pip install --quiet -c constraints.txt "$@" >"$LOG" 2>&1 </dev/null &
    PIP_PID=$!
    while kill -0 "$PIP_PID" 2>/dev/null; do
        sleep 1
        seconds=$((seconds + 1))
        if [ $((seconds % 20)) -eq 0 ]; then
            say "  ... $(find "$VENV/lib" -maxdepth 3 -name '*.dist-info' 2>/dev/null | wc -l | tr -d ' ') packages in place"
        fi
    done
    wait "$PIP_PID" || status=$?
    PIP_PID=
    [ "$status" -ne 0 ] || return 0

    rm -f "$UNFINISHED" # pip gave up by itself, so what it left is whole: the next run goes on from there
    grep -v '^WARNING:' "$LOG" | tail -n 20 >&2 || true
    if grep -qE 'NewConnectionError|NameResolution|Failed to establish|ConnectTimeout|ReadTimeout|ProxyError|unreachable' "$LOG"; then
        die "the package index cannot be reached: check the network, or pip's index and proxy settings, and run this again"
    fi
    die "pip install failed (exit $status); all it said is in $LOG"
}

interrupted() { # $UNFINISHED stays: the next run starts over
    [ -z "$PIP_PID" ] || kill "$PIP_PID" 2>/dev/null || true
    say "interrupted"
    exit 130
}

# ---

refuse_other_python
if is_up_to_date; then
    exit 0
fi

# One set-up at a time in a checkout (where there is no flock, as on macOS, do not start two). pip inherits the lock, so a
# pip that outlives a killed script still keeps the next set-up waiting.
exec 9<"$ROOT"
if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another set-up of this checkout to end"
    flock 9
    if is_up_to_date; then
        exit 0
    fi
fi
trap interrupted INT TERM HUP

if [ -e "$VENV" ] || [ -L "$VENV" ]; then
    reason="$(why_remake)"
    [ -z "$reason" ] || say ".venv is made anew: $reason"
else
    reason="there is none"
fi
if [ -n "$reason" ]; then
    python="$(find_python)"
    make_venv "$python"
elif "$VENV/bin/python" -m pip install --quiet --no-index --no-build-isolation -c constraints.txt -e '.[dev,tensorboard,cluster]' \
    >"$LOG" 2>&1 </dev/null; then
    wanted >"$STAMP" # all of it was there already (only tool settings changed, say): no network needed
    say "ready: .venv was refreshed"
    exit 0
fi

touch "$UNFINISHED"
torch="$(grep -m1 '^torch==' constraints.txt)"
if ! torch_is_there "$torch"; then
    # On its own and by its exact version: pip then takes a small CPU build where its settings offer one.
    say "installing $torch"
    pip_install "$torch"
fi
say "installing dots-align and what it needs (some minutes the first time)"
pip_install -e '.[dev,tensorboard,cluster]'

wanted >"$STAMP"
rm -f "$UNFINISHED"
say "ready: .venv with Python $(python_version "$VENV/bin/python")"
