# shellcheck shell=bash
# To be sourced: where there is a Python of a version, on PATH, pyenv's or uv's.

is_version() { "$1" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' "$2" 2>/dev/null; }

# Prints a Python of version $1, or nothing. Commands on PATH may be pyenv's shims, which fail when they are not chosen.
python_of() {
    local candidate
    for candidate in "python$1" python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/python; do
        if is_version "$candidate" "$1"; then echo "$candidate"; return; fi
    done
    if command -v uv > /dev/null; then uv python find --no-project "$1" 2>/dev/null || true; fi
}
