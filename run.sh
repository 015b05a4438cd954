#!/usr/bin/env bash
# The one command: sets up .venv on first use, then runs the job or one of the tools. `./run.sh --help` says more.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # for who calls it by `sh run.sh`
set -euo pipefail

# Where the project is, also when this is called through a link. The x keeps newlines at the end of a name.
self=$(readlink -f -- "${BASH_SOURCE[0]}" && echo x)
here=${self%/*}

# What runs outside the budget: modules of tools/, with _ for -.
tools='^(init|train|evaluate|audit|report|rehearse|reproduce|bench|make-checkpoint|fetch-weights)$'

fail() { # CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

# A virtual environment, by the first Python that suits, 3.11 to 3.13, or else by a newer one. Each is asked to run, not
# only looked up: version managers leave names behind that do not work. .venv may be a link to where there is room; what
# is made anew is cleared first, so that nothing but an environment, or nothing, may be there.
make_venv() {
    local candidate below venv=$here/.venv said=
    if [[ -L $venv ]]; then
        venv=$(readlink -f -- "$venv" && echo x)
        venv=${venv%?x}
        [[ -d $venv && (-f $venv/pyvenv.cfg || -z $(ls -A -- "$venv")) ]] ||
            fail 1 "$here/.venv leads to $venv, which is no Python environment and no empty folder: remove the link"
    elif [[ -e $venv && ! -d $venv ]]; then
        fail 1 "$venv is in the way of a Python environment: remove it"
    fi
    for below in 14 99; do
        for candidate in python3 python3.13 python3.12 python3.11; do
            if "$candidate" -c "import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, $below))" \
                2>/dev/null; then
                said=$("$candidate" -m venv --clear -- "$venv" 2>&1) && return
            fi
        done
    done
    fail 1 "Python 3.11 or newer is needed, with its venv module${said:+ (${said%%$'\n'*})}"
}

# Whether .venv has an interpreter and pip, and they are of one version of Python: one that was upgraded has no packages.
venv_is_whole() {
    local interpreter
    [[ -x $here/.venv/bin/python && -x $here/.venv/bin/pip ]] || return 1
    interpreter=$(readlink -f -- "$here/.venv/bin/python")
    [[ ${interpreter##*/} != python3.* ]] ||
        [[ -f $here/.venv/pyvenv.cfg && -d $here/.venv/lib/${interpreter##*/}/site-packages/pip ]]
}

# Whether the packages that a requirements file names are in .venv: a pip.conf may have them installed elsewhere.
has_packages() (
    shopt -s nocaseglob
    cd -- "$here/.venv/lib" 2>/dev/null || return 0
    while IFS=' =<>~!;[' read -r name _; do
        [[ $name != [[:alpha:]]* ]] || compgen -G "python3*/site-packages/${name//-/_}-*.dist-info" >/dev/null || return 1
    done <"$here/$1"
)

# Whether a requirements file is installed as it is now.
is_installed() {
    venv_is_whole && [[ -f $here/.venv/installed-$1 && $(<"$here/$1") == "$(<"$here/.venv/installed-$1")" ]]
}

# Installs requirements files into .venv, unless that was done. Of several processes that start at once, one does.
install() {
    local file size=
    for file in "$@"; do is_installed "$file" || break; done
    is_installed "$file" && return
    [[ -w $here || ! -L $here/.venv/bin/python || -x $here/.venv/bin/python ]] ||
        fail 1 "$here/.venv/bin/python leads to a Python that is gone or not for this user: have it installed for all"
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
        has_packages "$file" ||
            fail 1 "pip has installed $file elsewhere: look for target, prefix, root or dry-run in 'pip config list'"
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
unset PYTHONHOME PYTHONOPTIMIZE PYTHONWARNINGS PYTHONINSPECT USE_TORCH USE_TF USE_JAX USE_FLAX MPLBACKEND
[[ $here != *:* ]] || fail 2 "$here: Python finds nothing in a folder with a colon in its name: rename it"
env pwd >/dev/null 2>&1 || fail 2 "the folder that this is called from is gone: change into another"
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
elif ! type -P -- "$python" >/dev/null; then
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
    exec "$python" -m tools "$tool" "$@"
else
    exec "$python" -m submission "$@"
fi
