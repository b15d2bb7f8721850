#!/bin/sh
# make verify-gpu-host: runs the checks inside the server's image where there is one, else with the given Python.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python3}

if [ ! -d /opt/tritonserver ] && command -v docker >/dev/null 2>&1 && docker info >/dev/null 2>&1 &&
    nvidia-smi -L >/dev/null 2>&1; then
    exec docker compose -f "${here}/compose.yaml" --profile gpu run --rm --build \
        --volume "${here}/..:/project:ro" --workdir /project gpu \
        python3 -m flightline verify --server http://server:8000 --metrics http://server:8002/metrics
fi
cd "${here}/.."
exec "${python}" -m flightline verify --server "http://127.0.0.1:${HTTP_PORT:-8000}" \
    --metrics "http://127.0.0.1:${METRICS_PORT:-8002}/metrics"
