"""What a null server did, beside what the client recorded, on one clock.

On a busy machine every token may reach the client late, by any time, and that is no fault of the client. Two
things hold all the same: the luckiest tokens are hardly late at all, and none comes before it was sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from flightline.loadtest.metrics import Window
from flightline.loadtest.null_server import Served
from flightline.loadtest.records import RequestRecord

LUCKY_S = 0.010
"""A lucky token's way to the client takes less."""
ROUNDING_S = 1e-6


class Truth:
    """The server's log of the requests that are recorded; one response carries one token.

    Attributes:
        sent_ns: Request id -> when the server sent the tokens that arrived.
        soonest_s, latest_s: Bounds of the time that each of them took to arrive.
    """

    def __init__(self, records: Iterable[RequestRecord], log: Mapping[str, Served]) -> None:
        self.records = list(records)
        self.sent_ns = {
            r.id: np.array(log[r.id].token_monotonic_ns)[: len(r.chunk_ns)]
            for r in self.records
            if r.chunk_ns
        }
        delays_s = np.concatenate(
            [(np.array(r.chunk_ns) - self.sent_ns[r.id]) / 1e9 for r in self.records if r.chunk_ns]
        )
        self.soonest_s, self.latest_s = delays_s.min() - ROUNDING_S, delays_s.max() + ROUNDING_S

    def assert_prompt(self) -> None:
        """The client's time stamps have no delay of their own."""
        assert -ROUNDING_S <= self.soonest_s < LUCKY_S

    def assert_rate(self, tokens_per_s: float | None, windows: Sequence[Window]) -> None:
        """The rate is the server's in the windows, give or take what was on its way at their ends.

        What arrives in (start, end] was sent in (start - late, end], and what was sent in (start, end - late]
        arrives in (start, end], where ``late`` is the longest delay: so no tolerance need be chosen.
        """
        sent, late_ns = np.concatenate(list(self.sent_ns.values())), self.latest_s * 1e9

        def rate(sooner_ns: float, shorter_ns: float) -> float:
            tokens = [
                np.sum((sent > w.start_ns - sooner_ns) & (sent <= w.end_ns - shorter_ns)) for w in windows
            ]
            return float(sum(tokens)) / sum(window.seconds for window in windows)

        assert tokens_per_s is not None
        assert rate(0, late_ns) <= tokens_per_s <= rate(late_ns, 0)
