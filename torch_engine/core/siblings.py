"""Several answers to one prompt, whose KV blocks they share: the first is computed, the others start from it.

A sibling waits outside the scheduler, where it delays nobody, until the first one's prompt is in the KV cache. What
lies in the prompt's last, partial block each computes for itself.
"""

from __future__ import annotations

from flightline.torch_engine.core.sequence import Sequence


class Siblings:
    """Sequences of equal ``GenerationRequest.group`` and prompt, and who waits for whom."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._first: dict[str, Sequence] = {}
        self._held: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._held.values()))

    def hold(self, sequence: Sequence) -> bool:
        """Whether a new sequence has to wait for its sibling; :meth:`release` returns it then."""
        group = sequence.request.group
        if not group:
            return False
        first = self._first.get(group)
        if first is None or first.request.prompt_ids != sequence.request.prompt_ids:
            self._first[group] = sequence
            return False
        sequence.sibling = first
        if self._is_there(first):
            return False
        self._held.setdefault(group, []).append(sequence)
        return True

    def release(self) -> list[Sequence]:
        """Those that may start now. Where the first one has ended too early, the next takes its place."""
        ready: list[Sequence] = []
        for group, waiting in list(self._held.items()):
            first = self._first[group]
            if first.finish_reason is not None:
                self._first[group] = first = waiting.pop(0)
                first.sibling = None
                for other in waiting:
                    other.sibling = first
                ready.append(first)
            elif self._is_there(first):
                ready += waiting
                waiting.clear()
            if not waiting:
                del self._held[group]
        return ready

    def forget(self, sequence: Sequence) -> bool:
        """The sequence has ended; whether it was waiting here."""
        group = sequence.request.group
        waiting = self._held.get(group, [])
        if sequence in waiting:
            waiting.remove(sequence)
            if not waiting:
                del self._held[group]
            return True
        if not waiting and self._first.get(group) is sequence:
            del self._first[group]
        return False

    def _is_there(self, first: Sequence) -> bool:
        return first.num_computed >= first.num_shareable(self._block_size) * self._block_size
