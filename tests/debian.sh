#!/bin/sh
# debian.sh BIN PROGRAM PACKAGE PATH: PROGRAM, which is in no wheel, from Debian's PACKAGE (there at PATH) into BIN, for a
# test. The package and those that it needs and this machine lacks are unpacked beside BIN, not installed: no root needed.
# Where it cannot be had, this says so, and the test that wants it is skipped by name.
set -eu
bin=$(cd "$1" && pwd) program=$2 package=$3 path=$4
if command -v "$program" >/dev/null 2>&1 || [ -x "$bin/$program" ]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() {
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" "$work/root"
    apt="apt-get -qq -o Dir::State::Lists=$work/lists -o Dir::Cache=$work/cache -o APT::Sandbox::User="
    $apt update
    needed=$($apt install --simulate --no-install-recommends "$package" | awk '/^Inst / {print $2}')
    # shellcheck disable=SC2086 # words, on purpose
    (cd "$work/debs" && $apt download $needed)
    for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/root"; done
    test -x "$work/root/$path"
}

if ! fetch >"$work/log" 2>&1; then
    echo "$program: not installed, and Debian's package $package is not to be had: its test will be skipped" >&2
    exit 0
fi
root=$bin/../$program
rm -rf "$root"
mv "$work/root" "$root"
root=$(cd "$root" && pwd)
libraries=$(find "$root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd: -)
cat >"$bin/$program.part" <<END
#!/bin/sh
LD_LIBRARY_PATH="$libraries" exec "$root/$path" "\$@"
END
chmod +x "$bin/$program.part"
mv "$bin/$program.part" "$bin/$program"
