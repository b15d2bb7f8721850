"""Memory of the host, or of the container that this process runs in. No torch."""

from __future__ import annotations

from pathlib import Path

GROUP = "/sys/fs/cgroup/memory."


def host_memory() -> tuple[int, int]:
    """Total and available bytes, within the container's limit if it has one (Linux, cgroup v2).

    Pages of files, which count as used by a container, can be given back: they are available.
    """
    kilobytes = {key.rstrip(":"): int(value) for key, value in _facts("/proc/meminfo")}
    total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    limit, used = _read(f"{GROUP}max").strip(), _read(f"{GROUP}current").strip()
    if limit.isdigit():
        files = sum(
            int(value) for key, value in _facts(f"{GROUP}stat") if key in ("inactive_file", "active_file")
        )
        total = min(total, int(limit))
        free = min(free, int(limit) - int(used or 0) + files)
    return total, free


def free_host_memory() -> int:
    """Bytes that the host, or this container, has left."""
    return host_memory()[1]


def _facts(path: str) -> list[tuple[str, str]]:
    lines = [line.split() for line in _read(path).splitlines()]
    return [(line[0], line[1]) for line in lines]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
