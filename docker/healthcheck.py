"""Exit code 0 if the server answers a real request: with a dead Python stub Triton still says that it is ready.

A full queue is an answer, too, and a server so busy that a token takes longer than the check is healthy as long as
Triton itself answers; what is stuck for good, the supervisor restarts.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request

BODY = {"text_input": "a", "max_tokens": 1}
DEAD_STUB = "is not healthy"
PATIENCE_S = float(os.environ.get("HEALTH_PATIENCE_S") or 15)


def main() -> int:
    url = f"http://127.0.0.1:{os.environ.get('HTTP_PORT') or 8000}/v2"
    request = urllib.request.Request(f"{url}/models/text_generation/generate", json.dumps(BODY).encode())
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return 0 if "text_output" in json.load(response) else 1
    except urllib.error.HTTPError as error:
        return 1 if DEAD_STUB in error.read().decode("utf-8", "replace") else 0
    except TimeoutError:
        return 0 if _ready(url) else 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
