"""The chart, rendered by the real helm."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy/helm/flightline"
VALUES = {path.stem.removesuffix("-values"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
"""Name to file, of the sets of values that the chart is tried with."""


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return _run("helm", *arguments)


def kubectl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return _run("kubectl", *arguments)


def _run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{program} is not installed: make test says why")
    command = [found, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@functools.cache
def rendered(name: str, *more: str) -> tuple[dict[str, Any], ...]:
    """The objects of a set of values, with ``more`` after it as ``--set`` takes it."""
    sets = [word for each in more for word in ("--set", each)]
    done = helm(
        "template", "demo", CHART, "--namespace", "llm", "--kube-version", "1.34.0", "-f", VALUES[name], *sets
    )
    assert done.returncode == 0, done.stderr
    return tuple(each for each in yaml.safe_load_all(done.stdout) if each)


def one(objects: tuple[dict[str, Any], ...], kind: str, name: str = "") -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind and name in each["metadata"]["name"]]
    return found


def pods(objects: tuple[dict[str, Any], ...]) -> dict[str, dict[str, Any]]:
    """Name of the owner to pod template, of all that start pods."""
    found = {}
    for each in objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] in ("Deployment", "Job"):
            found[name] = each["spec"]["template"]
        elif each["kind"] == "LeaderWorkerSet":
            group = each["spec"]["leaderWorkerTemplate"]
            found |= {f"{name}/{part}": group[f"{part}Template"] for part in ("leader", "worker")}
    return found


def server(objects: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """The pod that serves."""
    (found,) = [
        pod
        for pod in pods(objects).values()
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "server"
    ]
    return found


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}
