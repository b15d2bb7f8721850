#!/bin/sh
# npm.sh FOLDER PACKAGE@VERSION: a package of npm's, for a test, into FOLDER/node_modules. Where it cannot be had, this says
# so, and the test that wants it is skipped by name.
set -eu
folder=$1 package=$2
if ! command -v npm >/dev/null 2>&1; then
    echo "npm: not installed: the test of $package will be skipped" >&2
    exit 0
fi
if [ "$(cat "$folder/version" 2>/dev/null)" = "$package" ]; then exit 0; fi
mkdir -p "$folder"
if npm install --prefix "$folder" --no-audit --no-fund --silent "$package" >"$folder/log" 2>&1; then
    echo "$package" >"$folder/version"
else
    echo "$package: not to be had from npm: its test will be skipped" >&2
fi
