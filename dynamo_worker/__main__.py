"""``python -m flightline.dynamo_worker --build-dir build``: runs until SIGTERM, which drains."""

from __future__ import annotations

import sys

from flightline.deployment import DeploymentError


def main() -> int:
    try:
        from dynamo.common.backend.run import run

        from flightline.dynamo_worker.worker import FlightlineEngine
    except ImportError as error:
        print(f"error: {error}: install Dynamo as docs/SCALE.md says", file=sys.stderr)
        return 1
    try:
        run(FlightlineEngine)
    except DeploymentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
