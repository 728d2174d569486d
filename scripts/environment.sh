# Sourced by the other scripts, for bash: goes to the root of the checkout and makes sure
# that .venv holds certjax and its tools. Sets `python`.
#
# Needs python3 >= 3.11 and a package index. uv is used where it is on PATH (exactly the
# versions of uv.lock), else venv and pip (the ranges of pyproject.toml).
#   PYTHON         the interpreter to use instead of python3
#   CERTJAX_VENV   another folder than .venv, e.g. one for each version of Python

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export UV_PROJECT_ENVIRONMENT="${CERTJAX_VENV:-$PWD/.venv}"
venv=$UV_PROJECT_ENVIRONMENT
python=$venv/bin/python
unset VIRTUAL_ENV  # another active environment is neither used nor warned about

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# What decides whether an installed environment is still the right one.
wanted() {
    "$python" - "$PWD" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root} {sys.version_info[:2]}".encode())
for name in ("pyproject.toml", "uv.lock"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PY
}

# PYTHON asks for a version: is the environment of that version?
right_version() {
    [ -z "${PYTHON:-}" ] || [ "$(version "$python")" = "$(version "$PYTHON")" ]
}

version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

installed() {
    [ -x "$python" ] && [ -f "$venv/.installed" ] && right_version &&
        [ "$(cat "$venv/.installed")" = "$(wanted)" ]
}

install_with_uv() {
    uv sync --locked --quiet ${PYTHON:+--python "$PYTHON"}
}

install_with_pip() {
    local base=${PYTHON:-python3}
    command -v "$base" >/dev/null ||
        fail "no '$base' found; install Python 3.11 or newer, or set PYTHON to one"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, '$base' is $("$base" --version 2>&1);" \
            "set PYTHON, e.g. PYTHON=python3.12 $0"
    "$base" -m venv --clear "$venv" ||
        fail "'$base -m venv' failed, see above; on Debian and Ubuntu:" \
            "apt install python3-venv; or install uv"
    "$python" -m pip install --quiet --disable-pip-version-check --editable '.[test]' ||
        fail "pip could not install certjax, see above (it needs a package index)"
}

install() {
    echo "Installing into $venv (once; about a minute) ..." >&2
    rm -f "$venv/.installed"
    if ! command -v uv >/dev/null; then
        install_with_pip
    elif ! install_with_uv; then
        echo "uv sync failed, see above; trying venv and pip ..." >&2
        install_with_pip
    fi
    wanted >"$venv/.installed"
}

if ! installed; then
    mkdir -p .cache
    exec 9>.cache/install.lock # another script may be installing: wait for it
    if command -v flock >/dev/null; then flock 9; fi
    installed || install
    exec 9>&-
fi
