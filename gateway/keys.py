"""API keys: one a line of a file; only their hashes stay in memory."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from pathlib import Path

from flightline.gateway.errors import ApiError
from flightline.gateway.settings import SettingsError

SHORTEST = 16
_LOOK_EVERY_S = 1.0

_log = logging.getLogger("gateway")


class ApiKeys:
    """Reads the file again when it has changed, or when told (SIGHUP)."""

    def __init__(self, path: str) -> None:
        """Raises SettingsError: the file cannot be read or holds no usable key. "" = nobody needs a key."""
        self._path = Path(path) if path else None
        self._hashes: list[bytes] = []
        self._stamp: tuple[int, int] | None = None
        self._looked = 0.0
        if self._path is not None:
            self._load(self._path)

    def _load(self, path: Path) -> None:
        try:
            status, lines = path.stat(), path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"API_KEYS_FILE={path} cannot be read ({error}): give a text file, one key a line"
            ) from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise SettingsError(f"API_KEYS_FILE={path} holds no key: write one a line")
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST or not key.isascii() or " " in key:
                raise SettingsError(
                    f"key {number} of API_KEYS_FILE={path} is not usable: use at least {SHORTEST} ASCII characters "
                    "without spaces, like those of 'openssl rand -hex 24'"
                )
        self._hashes = [_hash(key.encode()) for key in keys]
        self._stamp = (status.st_mtime_ns, status.st_ino)

    def reload(self) -> None:
        """Keeps the old keys if the new ones cannot be used, and logs why."""
        if self._path is None:
            return
        try:
            self._load(self._path)
            _log.info("API keys read again: %d", len(self._hashes))
        except SettingsError as error:
            _log.error("API keys stay as they were: %s", error)

    def _look(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        try:
            status = self._path.stat()
        except OSError:
            return
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            self._stamp = stamp  # a file that cannot be used is complained about once
            self.reload()

    def check(self, authorization: bytes | None) -> None:
        """Of the header's value. Raises ApiError: 401. Takes the same time for every wrong key."""
        if self._path is None:
            return
        self._look()
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = _hash(key.strip())
        known = 0
        for each in self._hashes:
            known |= hmac.compare_digest(each, digest)
        if not known or scheme.lower() != b"bearer":
            text = "no API key: send it as 'Authorization: Bearer KEY'" if not key else "incorrect API key"
            raise ApiError(401, text, code="invalid_api_key")


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
