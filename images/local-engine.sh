#!/usr/bin/env bash
# A Docker engine and base images on a Debian machine that has neither, as root: for CI.
#   images/local-engine.sh DIR    keeps all under DIR; prints the lines to export
# Where an engine answers already, it is taken. The base image is made of Debian's own packages where
# python:3.11-slim can't be pulled; the one that builds knows the certificates and wheels that pip on
# this machine knows. Stop what it started: kill "$(cat DIR/docker.pid)".
set -euo pipefail

dir=$(mkdir -p "$1" && cd "$1" && pwd)
base=python:3.11-slim
build=tuneline-build-base

fail() { echo "no Docker: $*" >&2; exit 1; }

have() { command -v "$1" > /dev/null; }

wanted=()
# a client alone is no engine
have docker && { have dockerd || docker info > /dev/null 2>&1; } || wanted+=(docker.io containerd)
have debootstrap || wanted+=(debootstrap)
if ((${#wanted[@]})); then
    [[ $(id -u) == 0 ]] && have apt-get || fail "${wanted[*]} can't be installed without root and apt-get"
    { timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 \
        apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "${wanted[@]}"; } > "$dir/apt.log" 2>&1 ||
        fail "${wanted[*]} could not be installed"
fi

# one that an earlier call has left
[[ ! -S $dir/docker.sock ]] || export DOCKER_HOST=unix://$dir/docker.sock
if ! docker info > /dev/null 2>&1; then
    # without a limit, every process of a container begins by closing a billion files
    printf '{"default-ulimits":{"nofile":{"Name":"nofile","Hard":20000,"Soft":20000}}}' > "$dir/daemon.json"
    export DOCKER_HOST=unix://$dir/docker.sock
    nohup dockerd --config-file "$dir/daemon.json" --data-root "$dir/data" --exec-root "$dir/exec" \
        --pidfile "$dir/docker.pid" -H "$DOCKER_HOST" > "$dir/dockerd.log" 2>&1 < /dev/null &
    for _ in $(seq 60); do
        docker info > /dev/null 2>&1 && break
        sleep 0.5
    done
    docker info > /dev/null 2>&1 || fail "$(tail -n 1 "$dir/dockerd.log")"
fi
driver=$(docker info --format '{{.Driver}}')
[[ $driver != vfs ]] || fail "its storage driver is vfs, which copies an image for each of its layers"

if ! docker image inspect "$base" > /dev/null 2>&1 &&
    ! timeout 60 docker pull --quiet "$base" > /dev/null 2>&1; then
    rm -rf "$dir/rootfs"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
        bookworm "$dir/rootfs" > "$dir/debootstrap.log" 2>&1 || fail "$(tail -n 1 "$dir/debootstrap.log")"
    tar -C "$dir/rootfs" -c . | docker import \
        --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$base" > /dev/null
    rm -rf "$dir/rootfs"
fi

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
mkdir "$context/wheels"
cp /etc/ssl/certs/ca-certificates.crt "$context/"
for folder in ${PIP_FIND_LINKS:-}; do
    [[ ! -d $folder ]] || find "$folder" -name 'torch-*.whl' -exec cp {} "$context/wheels/" \;
done
cat > "$context/Dockerfile" << END
FROM $base
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY wheels /opt/wheels
RUN printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = /opt/wheels\n' > /etc/pip.conf
END
docker build --quiet --tag "$build" "$context" > "$dir/base.log" 2>&1 || fail "$(tail -n 1 "$dir/base.log")"
docker run --rm "$build" python3 -m pip download --quiet --no-deps --dest /tmp packaging > "$dir/base.log" 2>&1 ||
    fail "a container reaches no package index"

[[ -z ${DOCKER_HOST:-} ]] || echo "export DOCKER_HOST=$DOCKER_HOST"
echo "export BASE_IMAGE=$base BUILD_IMAGE=$build"
