"""Exit code 0 if the server answers a real request: with a dead Python stub Triton still says that it is ready."""

from __future__ import annotations

import json
import os
import sys
import urllib.request

BODY = {"text_input": "a", "max_tokens": 1}


def main() -> int:
    port = os.environ.get("HTTP_PORT") or "8000"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/models/text_generation/generate", data=json.dumps(BODY).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return 0 if "text_output" in json.load(response) else 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
