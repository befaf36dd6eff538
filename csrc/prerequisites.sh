#!/bin/sh
# Name what this machine lacks before anything is set up: one line, with the command that installs it.
python=${1:-python3}
missing=
need() { missing="$missing $1"; }

if ! command -v "$python" >/dev/null; then
    need python3
    need python3-venv
    need python3-dev
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "kvmpy needs Python 3.11 or later, $python is older; name another: make PYTHON=/path/to/python3" >&2
    exit 1
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need python3-venv
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    test -e "$include/Python.h" || need python3-dev
fi
command -v gcc >/dev/null || need gcc
if [ -n "$missing" ]; then
    echo "missing:$missing -- install with: sudo apt install$missing" >&2
    exit 1
fi
