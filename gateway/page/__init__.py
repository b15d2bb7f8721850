"""The chat page that the gateway serves at ``/``: one file, no framework, no download."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path


@cache
def html() -> bytes:
    """The page, UTF-8; ``text/html; charset=utf-8``. It calls ``/v1/models`` and ``/v1/chat/completions`` beside it.

    Its content security policy allows its own script, by hash, and no other: what a model writes cannot run.
    """
    text = (Path(__file__).parent / "index.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return text.replace("sha256-SCRIPT", f"sha256-{digest}", 1).encode()
