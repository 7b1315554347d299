#!/usr/bin/env bash
# Builds the CPU image without a Docker engine, and lets it prune the example and build an engine for the result.
#
#   sudo docker/prove_without_engine.sh [options for `buildah bud`]
#
# The base is made here from Debian's packages, the image by buildah in a chroot. It takes root, `apt-get install buildah
# debootstrap` and about 4 GB under TMPDIR, and leaves nothing behind. SUITE (bookworm) and MIRROR choose the packages. A machine
# behind a mirror passes its pip configuration on: `--secret id=pip,src=/etc/pip.conf`, and folders with `-v HERE:THERE:ro`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for program in buildah debootstrap; do
    command -v "$program" >/dev/null || {
        echo "Error: $program is missing: apt-get install buildah debootstrap" >&2
        exit 1
    }
done

work=$(mktemp -d)
# --one-file-system: should a mount have survived, nothing behind it is touched.
trap 'rm -rf --one-file-system "$work"' EXIT
export BUILDAH_ISOLATION=chroot

tool() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "a base from Debian's packages"
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "${SUITE:-bookworm}" "$work/base" \
    ${MIRROR:+"$MIRROR"} >"$work/debootstrap.log" 2>&1 || {
    tail -n 5 "$work/debootstrap.log" >&2
    exit 1
}
container=$(tool from scratch)
tool add --quiet "$container" "$work/base" / >/dev/null
tool commit --quiet "$container" toast-base >/dev/null
tool rm "$container" >/dev/null
rm -rf --one-file-system "$work/base"

step "the image"
tool bud --quiet --format docker --file docker/cpu.Dockerfile --build-arg BASE=localhost/toast-base --tag toast-onnx:cpu "$@" . >/dev/null
tool images

step "the example, in the image, as its own user"
container=$(tool from --pull-never localhost/toast-onnx:cpu)
tool copy --quiet --chown 10001 "$container" examples/digits_vit.onnx examples/digits_test.npz examples/ratios.yaml /work/ >/dev/null
inside() { tool run "$container" -- "$@"; }
inside id -u
inside toast-onnx --version
inside toast-onnx inspect digits_vit.onnx
inside toast-onnx prune digits_vit.onnx --ratios ratios.yaml
inside toast-onnx eval digits_vit.pruned.onnx --data digits_test.npz --preprocess none
inside toast-onnx build digits_vit.pruned.onnx --precision fp16 --compute-capability 8.9
inside ls -l

step "all passed"
