"""The one exception of the build."""

from __future__ import annotations


class BuildError(Exception):
    """The build cannot go on; the message is one line that names the field, the value and the remedy."""
