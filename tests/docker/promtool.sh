#!/bin/sh
# promtool into the folder $1, for the tests of docker/: it is in no wheel, but in Debian's package prometheus.
# Needs no root. Where it cannot be had, it says so, and its test is skipped by name.
set -eu
into=$(cd "$1" && pwd)
if command -v promtool >/dev/null 2>&1 || [ -x "$into/promtool" ]; then exit 0; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! (cd "$folder" && apt-get download -qq prometheus && dpkg -x prometheus_*.deb .) >"$folder/log" 2>&1; then
    echo 'promtool: not installed, and not to be had with apt-get download prometheus: its test will be skipped' >&2
    exit 0
fi
mv "$folder/usr/bin/promtool" "$into/promtool.part"
mv "$into/promtool.part" "$into/promtool"
