"""The load test's image installs a part of the project's packages: it must be all that the load generator imports."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = """
import os
os.environ["LOCUST_SKIP_MONKEY_PATCH"] = "1"
import sys
import flightline.loadtest.commands
import flightline.loadtest.locustfile
print(*{name.partition(".")[0] for name in sys.modules})
"""


def installed() -> set[str]:
    """The Dockerfile's packages, and what those need."""
    wanted = re.search(r"wanted = \{(.*?)\}", (ROOT / "docker/loadtest.Dockerfile").read_text())
    assert wanted is not None
    found, todo = set(), set(re.findall(r"'([\w-]+)'", wanted[1])) | {"grpcio"}  # tritonclient[grpc]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        todo |= {re.split(r"[^\w.-]", line)[0] for line in needed if "extra ==" not in line}
    return found


def test_what_the_load_generator_imports_is_in_its_image():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, cwd=ROOT
    )
    owners = metadata.packages_distributions()
    missing = {}
    for module in done.stdout.split():
        distributions = {re.sub(r"[-_.]+", "-", name).lower() for name in owners.get(module, [])}
        if distributions and "flightline" not in distributions and not distributions & installed():
            missing[module] = distributions
    missing.pop("_distutils_hack", None)  # setuptools' own, in every environment
    assert not missing
