#!/bin/sh
# Name what this machine lacks before anything is set up: one line, with the command that installs it.
python=${1:-python3}
missing=
command -v "$python" >/dev/null || missing="$missing python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "kvmpy needs Python 3.11 or later: apt install python3 (or: make PYTHON=/path/to/python3.11)" >&2
    exit 1
}
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing="$missing python3-dev"
command -v gcc >/dev/null || missing="$missing gcc"
if [ -n "$missing" ]; then
    echo "missing:$missing -- install with: apt install$missing" >&2
    exit 1
fi
