#!/bin/sh
# What a server's container runs: "serve" builds what is not built yet and serves it; anything else runs as it is.
set -eu

if [ "${1:-serve}" != serve ]; then
    exec "$@"
fi

# FlashInfer and Triton's language write there when they are imported; a bind mount or --user may forbid it.
if ! mkdir -p "${HOME:=/cache/home}/.cache" 2>/dev/null || [ ! -w "${HOME}/.cache" ]; then
    echo "error: HOME=${HOME} is not writable by user $(id -u): give that user a folder, as compose.yaml does" \
        "(volume home:/cache/home)" >&2
    exit 1
fi

# An empty secret is no token.
if [ -n "${HF_TOKEN_PATH:-}" ] && [ ! -s "${HF_TOKEN_PATH}" ]; then
    unset HF_TOKEN_PATH
fi

# Only the build may need the hub and its token; the server runs without either.
python3 -m flightline.engine_build --build-dir "${BUILD_DIR}"
unset HF_TOKEN_PATH
exec env HF_HUB_OFFLINE=1 python3 -m flightline.supervisor.serve --build-dir "${BUILD_DIR}"
