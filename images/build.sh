#!/usr/bin/env bash
# Builds the images and prints what came out; with REGISTRY also pushes them and writes images.lock.
#   IMAGES           which of images/ (default: all)
#   BASE_IMAGE       Python 3.11 or newer on Debian or the like (default: that of the Dockerfiles)
#   BUILD_IMAGE      what builds, if it is to be another one
#   TORCH_INDEX_URL  the package index that torch alone is taken from: CUDA or CPU builds
#   IMAGE_SOURCE     where the code is, for a label (default: the remote `origin` without a login, if it is http)
#   REGISTRY         where to push, as in registry.example.org/team
#   LOCK             the file of digests (default: images.lock)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' components/tuneline/__init__.py)
lock=${LOCK:-images.lock}
command -v docker > /dev/null || { echo "error: docker is not installed: it builds the images" >&2; exit 2; }

arguments=(--build-arg "REVISION=$(git rev-parse HEAD 2> /dev/null || true)" --build-arg "VERSION=$version")
source=${IMAGE_SOURCE:-$(git config --get remote.origin.url 2> /dev/null | sed -n 's|^\(https\?://\)\([^/@]*@\)\?|\1|p' || true)}
arguments+=(--build-arg "SOURCE=$source")
for name in BASE_IMAGE BUILD_IMAGE TORCH_INDEX_URL; do
    [[ -z ${!name:-} ]] || arguments+=(--build-arg "$name=${!name}")
done

read -ra names <<< "${IMAGES:-cpu gpu}"
locked="" kept=()
for name in "${names[@]}"; do
    image=tuneline-$name:$version-python3.11
    [[ -f images/$name/Dockerfile ]] || { echo "error: there is no images/$name: cpu and gpu are" >&2; exit 2; }
    docker build --quiet "${arguments[@]}" -f "images/$name/Dockerfile" -t "$image" . > /dev/null
    docker image inspect --format "$image {{.Id}} {{.Size}} bytes" "$image"
    if [[ -n ${REGISTRY:-} ]]; then
        docker tag "$image" "$REGISTRY/$image"
        docker push --quiet "$REGISTRY/$image" > /dev/null
        digest=$(docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$image" |
            grep -m 1 -F "$REGISTRY/tuneline-$name@sha256:")
        locked+="$name: $digest"$'\n'
    fi
done

if [[ -n $locked ]]; then
    # lines of images that were not built this time stay
    for name in "${names[@]}"; do kept+=(-e "/^$name:/d"); done
    {
        printf '# Written by `make push-images`; `tuneline compile --release --images %s` reads it.\n%s' \
            "$lock" "$locked"
        [[ ! -f $lock ]] || sed -e '/^#/d' "${kept[@]}" "$lock"
    } > "$lock.partial"
    mv "$lock.partial" "$lock"
    cat "$lock"
fi
