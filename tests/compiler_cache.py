"""A C++ compiler that compiles the same thing once: tests build many engines, all with the same kernels.

``$CXX`` names a script that runs ``python compiler_cache.py FOLDER COMPILER ARGUMENT...``: options, ``-o`` with the
output, and the source.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: str, compiler: str, *arguments: str) -> int:
    place = arguments.index("-o") + 1
    output, source = Path(arguments[place]), Path(arguments[-1])
    key = hashlib.sha256("\0".join((*arguments[: place - 1], *arguments[place + 1 :])).encode())
    for path in sorted(source.parent.iterdir()):
        if path.is_file():
            key.update(path.read_bytes())
    cached = Path(folder) / key.hexdigest()
    if not cached.exists():
        status = subprocess.run([compiler, *arguments], check=False).returncode
        if status != 0:
            return status
        partial = cached.with_suffix(f".{os.getpid()}")
        shutil.copyfile(output, partial)
        partial.replace(cached)
    shutil.copyfile(cached, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
