"""Token sequences that may never be generated: which tokens would complete one now.

An Aho-Corasick automaton over token ids (Aho and Corasick 1975), of the words without their last tokens: taking a token
costs a few look-ups, however many words there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class BadWords:
    """The words' automaton. A state is an integer; 0 is the one in which nothing has been said.

    Args:
        words: token ids each; an empty word means nothing, ids outside the vocabulary cannot be said.
        vocab: size of the vocabulary.
    """

    def __init__(self, words: Iterable[Sequence[int]], vocab: int) -> None:
        words = [tuple(word) for word in words if word and 0 <= word[-1] < vocab]
        self.always = _ids(word[0] for word in words if len(word) == 1)
        """Tokens that are bad words by themselves: [count] int32."""
        self.longest = max(map(len, words), default=0)
        self._next: list[dict[int, int]] = [{}]
        self._shorter = [0]
        """State -> that of the longest proper ending of what it stands for."""
        banned: list[set[int]] = [set()]
        for word in words:
            if len(word) == 1:
                continue
            state = 0
            for token in word[:-1]:
                following = self._next[state].get(token)
                if following is None:
                    following = self._next[state][token] = len(self._next)
                    self._next.append({})
                    self._shorter.append(0)
                    banned.append(set())
                state = following
            banned[state].add(word[-1])
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for token, following in self._next[state].items():
                self._shorter[following] = self.advance(self._shorter[state], token)
                banned[following] |= banned[self._shorter[following]]
                queue.append(following)
        self.banned = [_ids(tokens) for tokens in banned]
        """For each state the tokens that complete a word of several tokens: [count] int32."""

    @property
    def spans_tokens(self) -> bool:
        """Whether what was said before matters."""
        return len(self._next) > 1

    def advance(self, state: int, token: int) -> int:
        """The state after ``token`` was said in ``state``."""
        while (following := self._next[state].get(token)) is None:
            if state == 0:
                return 0
            state = self._shorter[state]
        return following


def _ids(tokens: Iterable[int]) -> NDArray[np.int32]:
    return np.array(sorted(set(tokens)), dtype=np.int32)
