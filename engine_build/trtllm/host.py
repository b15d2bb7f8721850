"""The GPUs of this host as ``nvidia-smi`` describes them: in a fraction of a second, without torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

FIELDS = "name,compute_cap,memory.total,memory.free,driver_version"
MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory_total: int
    memory_free: int
    driver: str


def gpus() -> list[Gpu]:
    """The GPUs that a process started here would see; none if there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        if not visible or visible.startswith("-"):
            return []
        command.append(f"--id={visible}")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=4)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse(found.stdout) if found.returncode == 0 else []


def linked() -> str:
    """How the GPUs of this host reach each other: ``NVLink`` if each reaches all others by it, else ``PCIe``.

    Empty if that is not known.
    """
    try:
        found = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=4)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return parse_links(found.stdout) if found.returncode == 0 else ""


def parse_links(text: str) -> str:
    """``nvidia-smi topo -m``: a row for each GPU with what connects it to each: ``X``, ``NV18``, ``SYS``, ..."""
    rows = [line.split() for line in text.splitlines() if line.startswith("GPU")]
    links = [cell for row in rows for cell in row[1 : len(rows) + 1] if cell != "X"]
    if not links:
        return ""
    return "NVLink" if all(cell.startswith("NV") for cell in links) else "PCIe"


def parse(text: str) -> list[Gpu]:
    """Rows of ``nvidia-smi``'s CSV; a row that is no GPU is left out."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5:
            continue
        name, capability, total, free, driver = cells
        try:
            major, minor = capability.split(".")
            found.append(Gpu(name, (int(major), int(minor)), int(total) * MIB, int(free) * MIB, driver))
        except ValueError:
            continue
    return found
