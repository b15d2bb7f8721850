#!/bin/sh
# make up: starts the containers that fit this host and returns when the server answers. make down: up.sh down.
# PROFILES adds what else shall run: PROFILES='loadtest observability'.
set -eu

here=$(dirname "$0")

if ! command -v docker >/dev/null 2>&1; then
    echo "error: docker is not installed: 'make serve' runs the server without it" >&2
    exit 1
fi
if ! docker info >/dev/null 2>&1; then
    echo "error: docker is installed, but its daemon does not answer: start it (systemctl start docker)," \
        "or use 'make serve'" >&2
    exit 1
fi

if [ "${1:-up}" = down ]; then
    exec docker compose -f "${here}/compose.yaml" --profile '*' down
fi

server=cpu
extra=""
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    server=gpu
    if [ -z "${IMAGE:-}" ] && command -v python3 >/dev/null 2>&1; then # the newest container that the driver runs
        IMAGE=$(cd "${here}/.." && python3 -m flightline.engine_build.trtllm.containers)
        export IMAGE
    fi
    case " ${PROFILES:-} " in *" observability "*) extra=dcgm ;; esac
elif [ "${ENGINE:-auto}" != auto ] && [ "${ENGINE:-auto}" != torch ]; then
    echo "error: ENGINE=${ENGINE} needs an NVIDIA GPU and nvidia-smi shows none: use ENGINE=torch" >&2
    exit 1
fi

set --
for profile in "${server}" ${PROFILES:-} ${extra}; do
    set -- "$@" --profile "${profile}"
done
exec docker compose -f "${here}/compose.yaml" "$@" up --build --detach --wait
