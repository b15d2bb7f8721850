#!/bin/sh
# The load test's part on a GPU: the Transformers baseline against the engine at 1 and 64 requests in flight, the load
# generator's ceiling, a sweep from 1 to 256 through real Triton, and the high levels once more with a single worker.
# Run from the project's root, after `make build-engines`, with the environment that it made:
#
#   sh benchmarks/loadtest_gpu.sh [FOLDER FOR THE REPORTS] [PART ...]
#
# The parts are headline, ceiling, sweep and one-worker; without any, all of them: about 15 minutes, half of it the
# headline.
# PYTHON, BUILD_DIR, ROUNDS and BUDGET_S (of the headline), LEVELS, ONE_WORKER_LEVELS, SECONDS_EACH, PROCESSES (of the
# load generator, but for one-worker), INPUT_TOKENS, OUTPUT_TOKENS and PRICE ($ per hour) may be set; DCGM_URL names a
# DCGM exporter's metrics page.
# Every part runs, whatever the one before it said; the exit status is not 0 if one of them was INVALID or failed.
set -u
PYTHON=${PYTHON:-.venv/bin/python}
REPORTS=${1:-reports}
[ $# -gt 0 ] && shift
LEVELS=${LEVELS:-1,2,4,8,16,32,64,128,256}
ONE_WORKER_LEVELS=${ONE_WORKER_LEVELS:-64,128,256}
export OUTPUT_TOKENS=${OUTPUT_TOKENS:-128} INPUT_TOKENS=${INPUT_TOKENS:-128} PRICE=${PRICE:-0}
status=0

sweep() { # FOLDER, PROCESSES, LEVELS
    "$PYTHON" -m flightline.loadtest sweep --processes "$2" --levels "$3" --seconds "${SECONDS_EACH:-25}" \
        --slo mlperf-server --reports "$REPORTS/$1" || status=$?
}

for part in ${@:-headline ceiling sweep one-worker}; do
    echo "== $part"
    case $part in
    headline)
        "$PYTHON" -m flightline.loadtest compare --levels 1,64 --rounds "${ROUNDS:-5}" --processes "${PROCESSES:-4}" \
            --budget-s "${BUDGET_S:-520}" --reports "$REPORTS/headline" || status=$?
        ;;
    ceiling) "$PYTHON" -m flightline.loadtest calibrate --seconds 10 || status=$? ;;
    sweep) sweep sweep "${PROCESSES:-4}" "$LEVELS" ;;
    one-worker) sweep one-worker 1 "$ONE_WORKER_LEVELS" ;; # INVALID where one worker is not enough
    *)
        echo "error: PART=$part is not valid: use headline, ceiling, sweep or one-worker" >&2
        exit 2
        ;;
    esac
done
exit $status
