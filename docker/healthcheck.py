"""Exit code 0 if the server answers a real request: with a dead Python stub Triton still says that it is ready.

The gateway's ``/ready`` says so: a token has just come out of the model, or its queue is full, which is an answer, too.
A server so busy that a token takes longer than the check is healthy as long as the gateway itself answers; what is
stuck for good, the supervisor restarts.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request

PATIENCE_S = float(os.environ.get("HEALTH_PATIENCE_S") or 15)


def main() -> int:
    scheme = "https" if os.environ.get("FLIGHTLINE_TLS_CERT") or os.environ.get("TLS_CERT") else "http"
    url = f"{scheme}://127.0.0.1:{os.environ.get('FLIGHTLINE_HTTP_PORT') or os.environ.get('HTTP_PORT') or 8000}"
    try:
        return 0 if _status(f"{url}/ready", PATIENCE_S) == 200 else 1
    except TimeoutError:
        return 0 if _lives(url) else 1
    except OSError as error:
        print(error, file=sys.stderr)
        return 1


def _status(url: str, timeout_s: float) -> int:
    """Whoever has the certificate is this machine itself."""
    anybody = ssl._create_unverified_context() if url.startswith("https") else None
    with urllib.request.urlopen(url, timeout=timeout_s, context=anybody) as response:
        return response.status


def _lives(url: str) -> bool:
    try:
        return _status(f"{url}/health", 5) == 200
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
