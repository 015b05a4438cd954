#!/usr/bin/env bash
# The one command: sets up .venv on first use, then runs the job or one of the tools. `./run.sh --help` says more.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# What runs outside the budget: modules of tools/, with _ for -.
tools='^(init|evaluate|audit|report|rehearse|bench|make-checkpoint|fetch-weights|train-embedded)$'

# Installs a requirements file into .venv, once for each content of it.
install() {
    local requirements=$1 stamp
    stamp="$here/.venv/installed-$(sha256sum "$here/$requirements" | cut -c1-16)"
    [[ -e $stamp ]] && return
    echo "installing $requirements into .venv (once; a few minutes)" >&2
    if ! "$here/.venv/bin/pip" install --quiet --disable-pip-version-check --no-compile -r "$here/$requirements" \
        >"$here/.venv/install.log" 2>&1; then
        tail -n 20 "$here/.venv/install.log" >&2
        echo "error: installing $requirements failed; the whole log is in .venv/install.log" >&2
        exit 1
    fi
    # pip would compile on one core; on all of them, two took a fifth off the installation. Like pip, this passes over
    # what does not compile: torch brings a file for newer Pythons.
    "$here/.venv/bin/python" -m compileall -q -j 0 "$here/.venv/lib" >>"$here/.venv/install.log" 2>&1 || true
    touch "$stamp"
}

# Whether these options ask for several devices, which is what Ray is for.
several_devices() {
    local wanted=auto gpus
    while (($#)); do
        case $1 in
        --cluster | --cluster=*) return 0 ;;
        --devices=*) wanted=${1#*=} ;;
        --devices) wanted=${2:-auto} ;;
        --device=cpu) [[ $wanted == auto ]] && wanted=1 ;;
        --device) [[ ${2:-} == cpu && $wanted == auto ]] && wanted=1 ;;
        esac
        shift
    done
    if [[ $wanted == auto ]]; then
        gpus=(/dev/nvidia[0-9]*)
        # Where there are several, this process may yet be meant to see one of them.
        [[ -e ${gpus[0]} && ${#gpus[@]} -gt 1 && ${CUDA_VISIBLE_DEVICES-0,1} == *,* ]]
    else
        [[ ${wanted#cpu:} != 1 ]]
    fi
}

# BANKO_PYTHON is an interpreter where everything is installed already, as in the image.
python=${BANKO_PYTHON:-}
if [[ -z $python ]]; then
    if [[ ! -x $here/.venv/bin/pip ]]; then
        base=
        for candidate in python3 python3.13 python3.12 python3.11; do
            # Asked to run, not only looked up: version managers leave names behind that do not work.
            if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                base=$candidate
                break
            fi
        done
        if [[ -z $base ]]; then
            echo "error: Python 3.11 or newer is needed (with its venv module)" >&2
            exit 1
        fi
        "$base" -m venv "$here/.venv"
    fi
    python=$here/.venv/bin/python
    install requirements.txt
    if [[ ${1:-} == test || ${1:-} =~ $tools ]]; then
        install requirements-dev.txt
    elif several_devices "$@"; then
        install requirements-ray.txt
    fi
fi

if ! command -v "$python" >/dev/null; then
    echo "error: BANKO_PYTHON=$python is no Python interpreter: name one that has requirements.txt installed, or none" >&2
    exit 2
fi

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
if [[ ${1:-} == test ]]; then
    shift
    cd "$here"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    exec "$python" -m pytest "$@"
elif [[ ${1:-} =~ $tools ]]; then
    tool=${1//-/_}
    shift
    exec "$python" -m "tools.$tool" "$@"
else
    exec "$python" -m submission "$@"
fi
