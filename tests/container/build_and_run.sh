#!/usr/bin/env bash
# Builds the Dockerfile's CPU target on a bare Debian root, without a container engine and without network, and runs it
# as its own user with the network cut: without arguments to the end, told to stop in the middle, and with a folder for
# the outputs that is not mounted, or not writable.
#
#     tests/container/build_and_run.sh [WORK]
#
# Needs root, buildah, debootstrap, 8 GB, and network for the Debian root and the wheels, which WORK keeps for the next
# time, with the outputs (default: a temporary folder). TORCH is the torch to install (default: the CPU build of the one
# in requirements.txt). Exits with 2 where something needed is missing.
set -euo pipefail
trap 'echo "failed: $BASH_COMMAND" >&2' ERR
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

lacking() {
    echo "error: $1" >&2
    exit 2
}

say() { echo "$(date +%T) $*"; }

((EUID == 0)) || lacking "making a root file system takes root"
for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null || lacking "$tool is needed (apt-get install $tool)"
done

work=${1:-$(mktemp -d)}
mkdir -p "$work"
buildah=(buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs)
if [[ ${1:-} ]]; then passing=("$work/storage" "$work/run"); else passing=("$work"); fi
trap 'rm -rf "${passing[@]}"' EXIT

# The wheels, fetched here, where pip is configured: 3.11 is this Debian's Python.
torch=${TORCH:-$(grep '^torch==' "$project/requirements.txt")+cpu}
say "wheels, with $torch"
sed "s|^torch==.*|$torch|" "$project/requirements.txt" >"$work/requirements.txt"
"${BANKO_PYTHON:-python3}" -m pip --quiet download --dest "$work/wheels" --python-version 3.11 \
    --only-binary=:all: -r "$work/requirements.txt" -r "$project/requirements-ray.txt" 2>"$work/pip.log" ||
    lacking "pip finds no $torch, or not all of the others: $(grep -m1 ERROR "$work/pip.log"); TORCH names another"

# The base: a Debian with Python and its venv module, and nothing else.
if [[ ! -d $work/debian ]]; then
    say "a Debian root"
    rm -rf "$work/debian.part"
    debootstrap --variant=minbase --include=python3-venv bookworm "$work/debian.part" >"$work/debootstrap.log"
    mv "$work/debian.part" "$work/debian"
fi
container=$("${buildah[@]}" from scratch)
"${buildah[@]}" add --quiet "$container" "$work/debian" / >/dev/null
"${buildah[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
"${buildah[@]}" commit --quiet --rm "$container" localhost/banko-base >/dev/null

say "the image"
began=$SECONDS
unshare --net "${buildah[@]}" build --quiet --isolation chroot --target cpu --build-arg BASE=localhost/banko-base \
    --build-arg TORCH="$torch" --build-arg PIP_FIND_LINKS=/wheels --build-arg PIP_NO_INDEX=1 \
    --volume "$work/wheels:/wheels:ro" --tag banko-submit:cpu "$project" >"$work/build.log" 2>&1 ||
    { tail -n 20 "$work/build.log" >&2; exit 1; }
container=$("${buildah[@]}" from banko-submit:cpu)
root=$("${buildah[@]}" mount "$container")
megabytes() { du -sm "$1" | cut -f1; }
say "built in $((SECONDS - began)) s: $(megabytes "$root") MB, of which the base $(megabytes "$work/debian")"

config() { "${buildah[@]}" inspect --type image --format "$1" banko-submit:cpu | sed '/^$/d'; }
user=$(config '{{.OCIv1.Config.User}}')
folder=$(config '{{.OCIv1.Config.WorkingDir}}')
mapfile -t environment < <(config '{{range .OCIv1.Config.Env}}{{println .}}{{end}}')
mapfile -t entrypoint < <(config '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}')
mapfile -t default < <(config '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}')
[[ ${user%%:*} != 0 ]]

# What an engine does with --network none, -v OUTPUTS:/outputs unless that is empty, and -e SETTINGS: the image's entry
# point with these arguments, or its default ones, as process 1 of its own, with the image's user, environment and
# working folder. Process 1 gets no signal that it does not ask for.
settings=()
start() {
    local outputs=$1
    shift
    (($#)) || set -- "${default[@]}"
    # shellcheck disable=SC2016
    exec unshare --net --pid --mount --fork --kill-child bash -euc '
        root=$1 outputs=$2 user=$3 folder=$4
        shift 4
        [[ -z $outputs ]] || mount --bind "$outputs" "$root/outputs"
        mount --rbind /dev "$root/dev"
        mount -t proc proc "$root/proc"
        exec chroot --userspec="$user" "$root" /usr/bin/env --ignore-environment --chdir="$folder" "$@"
    ' - "$root" "$outputs" "$user" "$folder" "${environment[@]}" "${settings[@]}" "${entrypoint[@]}" "$@"
}

check() { # FOLDER TASK
    "$project/run.sh" audit "$1/$2.pt"
    [[ $(stat -c %u "$1/$2.pt") == "${user%%:*}" ]]
    grep -q '"source": "BANKO_MODEL=embedded"' "$1/$2.json"
}

rm -rf "$work/outputs" "$work/stopped" "$work/closed"
install -d -o "${user%%:*}" -g "${user##*:}" "$work/outputs" "$work/stopped"
install -d "$work/closed"

say "no arguments, BANKO_BUDGET=90s, to the end"
began=$SECONDS
settings=(BANKO_BUDGET=90s)
(start "$work/outputs")
settings=()
say "ended after $((SECONDS - began)) s"
((SECONDS - began <= 180))
check "$work/outputs" cifar100
check "$work/outputs" tinyimagenet
[[ $(grep -c 'nothing is mounted' "$work/outputs/cifar100.json") == 0 ]]

say "cifar100 --budget 90s, told to stop"
(start "$work/stopped" cifar100 --budget 90s --max-ipc 100000) &
engine=$!
until [[ -e $work/stopped/cifar100.pt ]]; do
    kill -0 "$engine"
    sleep 0.1
done
sleep 5
began=$SECONDS
kill -TERM "$(pgrep --parent "$engine")"
wait "$engine"
say "ended $((SECONDS - began)) s after SIGTERM"
((SECONDS - began <= 10))
check "$work/stopped" cifar100
grep -q 'told to stop (SIGTERM)' "$work/stopped/cifar100.json"

say "outputs that are not mounted"
(start "" cifar100 --budget 90s --max-ipc 1 --select none) | grep 'nothing is mounted at /outputs'

say "outputs that are not writable"
code=0
(start "$work/closed" cifar100 --budget 90s) 2>"$work/refused" || code=$?
cat "$work/refused"
((code == 5))
grep -q "as user ${user%%:*}: run the image with --user" "$work/refused"
