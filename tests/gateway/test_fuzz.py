from __future__ import annotations

from tests.gateway.fuzz import fuzz


def test_hundreds_of_bad_requests() -> None:
    """Ten thousand are a command: ``python -m tests.gateway.fuzz``."""
    counts, _ = fuzz(400, seed=7, idlers=50)
    answered = {name.split()[1] for name in counts}
    assert {"200", "400", "404", "431"} <= answered and counts.total() >= 450
    assert (counts["idle dropped"], counts["idle open"]) == (25, 25)
