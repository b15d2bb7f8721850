#!/bin/sh
# All that is measured on one GPU, in one command and in this order: correctness (and no further if that fails), the engine
# beside a peer, gaps and profile, the FP8 build, served through Triton, the headline against Transformers, the sweep.
# Run from the project's root, after `make setup`; about 40 minutes on an H200:
#
#   sh benchmarks/gpu_all.sh FOLDER
#
# PEER is a peer's command as for gpu_compare.py, PEER_SERVED one that measures it served (its output is kept,
# and what it writes to $OUT); both may be missing. PYTHON=echo prints the commands. Data and logs go to FOLDER, a folder a step.
set -u
PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=$(mkdir -p "${1:?give a folder for data and reports}" && cd "$1" && pwd)
made=$FOLDER/checkpoints
status=0

step() { # NAME COMMAND...
    name=$1
    shift
    mkdir -p "$FOLDER/$name"
    echo "== $name"
    { "$@" 2>&1 || echo "$?" >"$FOLDER/$name/failed"; } | tee "$FOLDER/$name/log"
    if [ -e "$FOLDER/$name/failed" ]; then
        status=1
        echo "== $name failed: see $FOLDER/$name/log" >&2
    fi
}

rm -f "$FOLDER"/*/failed
step correctness "$PYTHON" -m pytest -q -m gpu tests/torch_engine
[ $status -eq 0 ] || exit 1
if [ -n "${PEER:-}" ]; then
    step compare "$PYTHON" benchmarks/gpu_compare.py --out "$FOLDER/compare/compare.json" --rounds 2 --peer "$PEER" -- --kv fp8 --repeats 3
else
    step throughput "$PYTHON" benchmarks/gpu.py --parts throughput --repeats 3 --out "$FOLDER/throughput/gpu.json"
fi
step gaps "$PYTHON" benchmarks/gpu.py --parts gaps,profile --out "$FOLDER/gaps/gpu.json"
step checkpoint "$PYTHON" benchmarks/gpu_checkpoint.py --folder "$made" --out "$FOLDER/checkpoint/checkpoint.json"
step served "$PYTHON" benchmarks/gpu_served.py --from "$made" --folder "$FOLDER/build-served" --repeats 2 \
    --out "$FOLDER/served/served.json"
[ -z "${PEER_SERVED:-}" ] || step peer-served env OUT="$FOLDER/peer-served" sh -c "$PEER_SERVED"
export BASELINE_MAX_BATCH_SIZE=64 BUILD_DIR="$FOLDER/build-headline/build" PYTHON
step build "$PYTHON" benchmarks/gpu_served.py --from "$made" --folder "$FOLDER/build-headline" --build-only
step loadtest sh benchmarks/loadtest_gpu.sh "$FOLDER/reports"
exit $status
