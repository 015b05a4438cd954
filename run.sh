#!/usr/bin/env bash
# The one command: sets up .venv on first use, then runs the job or one of the tools. `./run.sh --help` says more.
set -euo pipefail

# Where the project is, also when this is called through a link. The x keeps newlines at the end of a name.
self=$(readlink -f -- "${BASH_SOURCE[0]}" && echo x)
here=${self%/*}

# What runs outside the budget: modules of tools/, with _ for -.
tools='^(init|evaluate|audit|report|rehearse|bench|make-checkpoint|fetch-weights|train-embedded)$'

fail() { # CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

# A virtual environment, by the first Python that is new enough. Each is asked to run, not only looked up: version
# managers leave names behind that do not work.
make_venv() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -m venv --clear "$here/.venv"
            return
        fi
    done
    fail 1 "Python 3.11 or newer is needed (with its venv module)"
}

# Whether .venv has an interpreter, and its packages are those of this version: one that was upgraded has none.
venv_is_whole() {
    local interpreter
    [[ -x $here/.venv/bin/python && -x $here/.venv/bin/pip ]] || return 1
    interpreter=$(readlink -f -- "$here/.venv/bin/python")
    [[ ${interpreter##*/} != python3.* || -d $here/.venv/lib/${interpreter##*/} ]]
}

# Whether a requirements file is installed as it is now.
is_installed() {
    venv_is_whole && cmp -s -- "$here/$1" "$here/.venv/installed-$1"
}

# Installs requirements files into .venv, unless that was done. Of several processes that start at once, one does.
install() {
    local file size=
    for file in "$@"; do is_installed "$file" || break; done
    is_installed "$file" && return
    [[ $here != *:* ]] || fail 2 "$here: Python makes no environment in a folder with a colon in its name: rename it"
    [[ -w $here ]] || fail 1 "$here is not writable, and its .venv is not whole: install there as someone who may write"
    if command -v flock >/dev/null; then
        exec 9>"$here/.venv.lock"
        flock 9
    fi
    venv_is_whole || make_venv
    for file in "$@"; do
        is_installed "$file" && continue
        if [[ $file == requirements.txt ]]; then
            size=": 6 GB on disk, most of it PyTorch for NVIDIA GPUs. Without one, stop this (Ctrl-C) and give pip the index"
            size+=" of PyTorch's CPU builds, from its installation instructions: PIP_EXTRA_INDEX_URL=INDEX $0"
        fi
        echo "installing $file into .venv, once; a few minutes$size" >&2
        # The user's own settings of pip hold, but for those that would install elsewhere, or nothing.
        if ! env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PIP_DRY_RUN -u PIP_NO_DEPS -u PIP_PYTHON -u PIP_REPORT \
            PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 \
            "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r "$here/$file" \
            >"$here/.venv/install.log" 2>&1 9>&-; then
            tail -n 20 -- "$here/.venv/install.log" >&2
            fail 1 "installing $file failed, and is tried again by the next start; the log is in .venv/install.log"
        fi
        # pip would compile on one core; on all of them, two took a fifth off the installation. Like pip, this passes
        # over what does not compile: torch brings a file for newer Pythons.
        "$here/.venv/bin/python" -m compileall -q -j 0 "$here/.venv/lib" >>"$here/.venv/install.log" 2>&1 9>&- || true
        cp -- "$here/$file" "$here/.venv/installed-$file"
        size=
    done
    exec 9>&-
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

# Neither modules in the folder this is called from nor another Python's packages take the place of our own; and so for
# all processes that are started.
unset PYTHONHOME PYTHONOPTIMIZE PYTHONWARNINGS
export PYTHONPATH=$here PYTHONSAFEPATH=1

# BANKO_PYTHON is an interpreter where everything is installed already, as in the image.
python=${BANKO_PYTHON:-}
if [[ -z $python ]]; then
    needed=(requirements.txt)
    if [[ ${1:-} == test || ${1:-} =~ $tools ]]; then
        needed+=(requirements-dev.txt)
    elif several_devices "$@"; then
        needed+=(requirements-ray.txt)
    fi
    install "${needed[@]}"
    python=$here/.venv/bin/python
elif ! command -v -- "$python" >/dev/null; then
    fail 2 "BANKO_PYTHON=$python is no Python interpreter: name one that has requirements.txt installed, or none"
fi

if [[ ${1:-} == test ]]; then
    shift
    cd -- "$here"
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
