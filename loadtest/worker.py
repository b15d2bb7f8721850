"""``flightline loadtest worker --master-host HOST``: load from this machine, run after run, until Ctrl-C.

Locust's workers end with each run; this starts the next.
"""

from __future__ import annotations

import subprocess
import sys
import time

from flightline.loadtest.conditions import PROJECT
from flightline.loadtest.options import WorkerOptions
from flightline.loadtest.trial import LOCUSTFILE
from flightline.settings import load

PAUSE_S = 0.5


def main(arguments: list[str]) -> int:
    options = load(WorkerOptions, "flightline loadtest worker", arguments)
    where = [f"--master-host={options.master_host}", f"--master-port={options.master_port}"]
    command = [
        sys.executable,
        "-m",
        "flightline.loadtest.locust_main",
        "-f",
        str(LOCUSTFILE),
        "--worker",
        *where,
    ]
    print(
        f"worker: waiting for runs from {options.master_host}:{options.master_port}; Ctrl-C stops", flush=True
    )
    done = 0
    try:
        while not options.runs or done < options.runs:
            # Locust tries for a minute to connect and then gives up; here that is no failure.
            done += (
                subprocess.call(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                == 0
            )
            time.sleep(PAUSE_S)
    except KeyboardInterrupt:
        pass
    return 0
