"""A C++ compiler that compiles the same thing once: tests build many engines, all with the same kernels.

``$CXX`` names a script that runs ``python compiler_cache.py FOLDER COMPILER ARGUMENT...``: options, ``-o`` with the
output, and the source.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

VARIABLE = "FLIGHTLINE_TEST_COMPILED"
"""Is set where the cache is in use."""


def main(folder: str, compiler: str, *arguments: str) -> int:
    place = arguments.index("-o") + 1
    output, source = Path(arguments[place]), Path(arguments[-1])
    # What is in the source's folder, and not where that is: an installed copy has the same kernels.
    key = hashlib.sha256("\0".join((*arguments[: place - 1], *arguments[place + 1 : -1])).encode())
    for path in sorted(source.parent.iterdir()):
        if path.is_file():
            key.update(path.read_bytes())
    cached = Path(folder) / key.hexdigest()
    with cached.with_suffix(".lock").open("w") as lock:  # who wants the same meanwhile waits for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = compile_into(cached, output, [compiler, *arguments])
    if status == 0:
        shutil.copyfile(cached, output)
    return status


def compile_into(cached: Path, output: Path, command: list[str]) -> int:
    """The compiler's status; 0 if it had been compiled before."""
    if not cached.exists():
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            return status
        partial = cached.with_suffix(f".{os.getpid()}")
        shutil.copyfile(output, partial)
        partial.replace(cached)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
