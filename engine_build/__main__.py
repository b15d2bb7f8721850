"""``flightline build``: one line a stage; exit code 0 built, 1 cannot be built, 130 interrupted."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Sequence

from flightline.engine_build.errors import BuildError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one build and returns the exit code."""
    stop = _Stop()
    # Spinning OpenMP threads make a shared machine several times slower; read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start = time.monotonic()
    try:
        # Imported here, so that a Ctrl-C in the first moments ends in one line, too.
        from flightline.engine_build.build import Build
        from flightline.engine_build.settings import parse

        build = Build(parse(arguments), lambda line: print(line, flush=True))
        deployment = build.run()
    except KeyboardInterrupt:
        return stop.say()
    except BuildError as error:
        return stop.say() if stop.asked else _fail(str(error))
    except Exception as error:
        if stop.asked:  # a library turned the interruption into an error of its own
            return stop.say()
        message = _known_trouble(error)
        if message is None:
            raise
        return _fail(f"{message}; nothing half-written was left")
    if not deployment:  # a dry run
        return 0
    print(f"built {deployment['engine_dir']} in {time.monotonic() - start:.1f} s")
    return 0


class _Stop:
    """Ctrl-C or SIGTERM, remembered."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, signum: int, frame: object) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def say(self) -> int:
        print("\nbuild interrupted: nothing half-written was left", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _known_trouble(error: BaseException | None) -> str | None:
    """The machine's own limits in plain words. Libraries wrap the system's error, some as text only."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
            return "the disk is full: free some space and build again"
        if isinstance(error, MemoryError) or "out of memory" in text or "not enough memory" in text:
            return "not enough memory to run the source model: free some, or choose a smaller MODEL"
        if isinstance(error, PermissionError):
            return f"{error.filename} may not be used ({error.strerror}): check its permissions"
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
