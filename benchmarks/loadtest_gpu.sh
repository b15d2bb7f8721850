#!/bin/sh
# The load test's part on a GPU: the load generator's ceiling, then a sweep from 1 to 256 requests in flight through real
# Triton. Run from the project's root, after `make build-engines`, with the environment that it made:
#
#   sh benchmarks/loadtest_gpu.sh [FOLDER FOR THE REPORTS]
#
# MODEL, PRECISION, PRICE ($ per hour), LEVELS and SECONDS_EACH may be set; DCGM_URL names a DCGM exporter. Takes about 10 minutes.
set -eu
PYTHON=${PYTHON:-.venv/bin/python}
REPORTS=${1:-reports}
export OUTPUT_TOKENS=${OUTPUT_TOKENS:-128} INPUT_TOKENS=${INPUT_TOKENS:-128} PRICE=${PRICE:-0}
# One worker's ceiling without a server in the way, then through Triton: the sweep is INVALID where it is reached.
"$PYTHON" -m loadtest calibrate --seconds 10
PROCESSES=1 "$PYTHON" -m loadtest sweep --levels "${LEVELS:-1,2,4,8,16,32,64,128,256}" --seconds "${SECONDS_EACH:-25}" \
    --slo mlperf-server --reports "$REPORTS/one-worker" || echo "one worker: not VALID at every level, see its report"
PROCESSES=4 "$PYTHON" -m loadtest sweep --levels "${LEVELS:-1,2,4,8,16,32,64,128,256}" --seconds "${SECONDS_EACH:-25}" \
    --slo mlperf-server --reports "$REPORTS/sweep"
