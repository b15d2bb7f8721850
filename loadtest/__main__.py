"""``flightline loadtest COMMAND [options]``; each command says its own with ``--help``."""

from __future__ import annotations

import sys

from flightline.loadtest import calibrate, commands, ui, worker
from flightline.settings import SettingsError

COMMANDS = {
    "bench": ("both endpoints of the built server against each other, as 'make bench' does", None),
    "run": ("one load on one endpoint: closed loop, open loop or trace", None),
    "compare": ("several endpoints or servers in turns, or two saved runs", None),
    "sweep": ("loads from low to high: the curve and its knee", None),
    "search": ("the highest rate that holds an SLO", None),
    "calibrate": ("what the load generator itself can take in, against a null server", calibrate.main),
    "worker": ("a worker process for a run with --workers, on any machine", worker.main),
    "ui": ("Locust's web page", ui.main),
}


def main() -> int:
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in COMMANDS:
        lines = [f"  {command:<10} {about}" for command, (about, _) in COMMANDS.items()]
        print("\n".join(["usage: flightline loadtest COMMAND [options]", *lines]), file=sys.stderr)
        return 2
    own = COMMANDS[name][1]
    try:
        return own(arguments) if own else commands.main(name, arguments)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
