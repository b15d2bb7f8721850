#!/bin/sh
# make lint-deploy: checkov over what the chart renders of each set of values. What is waived, deploy/checkov.yaml says why.
set -eu
venv=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
checkov=$venv/checkov/bin/checkov
if [ ! -x "$checkov" ]; then
    "$venv/bin/python" -m venv "$venv/checkov"
    "$venv/checkov/bin/pip" install -qq --disable-pip-version-check checkov==3.3.30
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for values in "$here"/helm/flightline/ci/*-values.yaml; do
    name=$(basename "$values" -values.yaml)
    "$venv/bin/helm" template demo "$here/helm/flightline" --namespace llm --kube-version 1.34.0 --values "$values" \
        >"$work/$name.yaml"
done
# It does not know a LeaderWorkerSet: its pods go through as pods.
"$venv/bin/python" - "$work" <<'END'
import pathlib
import sys

import yaml

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.yaml")):
    for each in yaml.safe_load_all(path.read_text()):
        if each and each["kind"] == "LeaderWorkerSet":
            group = each["spec"]["leaderWorkerTemplate"]
            for part in ("leader", "worker"):
                pod = {"apiVersion": "v1", "kind": "Pod", **group[f"{part}Template"]}
                pod["metadata"] |= {"name": f"{path.stem}-{part}", "namespace": "llm"}
                path.with_name(f"{path.stem}-{part}.yaml").write_text(yaml.safe_dump(pod))
END
# Nothing is asked of its makers' service, which the findings do not need.
"$checkov" --directory "$work" --config-file "$here/checkov.yaml" --framework kubernetes --compact --quiet \
    --skip-download
