# Sourced by the scripts beside it, never run. Sets ROOT and goes nowhere: a script keeps its caller's directory.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PIP_DISABLE_PIP_VERSION_CHECK=1

# usage "$@": answers -h and --help with the comment block at the head of the calling script.
usage() {
    case "${1:-}" in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
    esac
}

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# The first interpreter that is new enough and can make a venv (Debian ships ensurepip apart). BATON_PYTHON overrides.
find_python() {
    local python candidates=(python3.11 python3.12 python3.13 python3.14 python3)
    [ -z "${BATON_PYTHON:-}" ] || candidates=("$BATON_PYTHON")
    for python in "${candidates[@]}"; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    die "no Python 3.11 or newer that can make a venv (tried: ${candidates[*]});" \
        "install one (Debian: python3.11 python3.11-venv) or name one in BATON_PYTHON"
}

# ensure_venv DIR: a working venv in DIR. One that was copied or moved is made anew: its scripts name the old place.
ensure_venv() {
    local python
    if ! { "$1/bin/python" -c '' && grep -qF "$1" "$1/bin/activate"; } 2>/dev/null; then
        python="$(find_python)"
        "$python" -m venv --clear "$1"
    fi
}

# once DIR INSTALLER FILE...: runs INSTALLER DIR unless it already succeeded for these very FILEs in this place. One at
# a time (flock). The stamp is written last, so an interrupted run is simply done again.
once() {
    local dir="$ROOT/$1" lock="$ROOT/.cache/${1#.}.lock" stamp
    mkdir -p "$ROOT/.cache"
    stamp="$(cd "$ROOT" && echo "$dir" && sha256sum "${@:3}")"
    (
        flock -w 900 9 || die "another installation has held $lock for 15 minutes"
        if [ "$(cat "$dir/.stamp" 2>/dev/null)" = "$stamp" ] && "$dir/bin/python" -c '' 2>/dev/null; then exit 0; fi
        ensure_venv "$dir"
        rm -f "$dir/.stamp"
        "$2" "$dir"
        echo "$stamp" >"$dir/.stamp"
    ) 9>"$lock"
}
