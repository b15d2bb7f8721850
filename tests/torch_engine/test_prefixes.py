"""The table of prompts' beginnings: shared by processes, never sure, never in the way."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flightline.torch_engine.process.prefixes import CHUNK, MOST_ENGINES, SLOTS, Prefixes, chunk_keys

PROMPT = random.Random(1).choices(range(128_000), k=10 * CHUNK + 5)


@pytest.fixture
def prefixes(tmp_path: Path) -> Prefixes:
    return Prefixes(str(tmp_path / "prefixes"))


def test_an_engine_is_known_by_the_longest_beginning_that_it_has_seen(prefixes: Prefixes) -> None:
    other_end = [*PROMPT[: 4 * CHUNK + 3], *range(6 * CHUNK)]
    prefixes.add(chunk_keys(PROMPT), 0)
    prefixes.add(chunk_keys(other_end), 2)
    assert prefixes.known(chunk_keys(PROMPT), 4) == [10 * CHUNK, 0, 4 * CHUNK, 0]
    assert prefixes.known(chunk_keys(other_end), 4) == [4 * CHUNK, 0, 10 * CHUNK, 0]
    assert prefixes.known(chunk_keys(PROMPT[: 3 * CHUNK - 1]), 3) == [2 * CHUNK, 0, 2 * CHUNK]
    assert prefixes.known(chunk_keys(PROMPT[CHUNK:]), 4) == [0] * 4  # the same tokens after others are others
    assert prefixes.known(chunk_keys(PROMPT[: CHUNK - 1]), 4) == [0] * 4


def test_every_bit_is_an_engine_and_no_more(prefixes: Prefixes) -> None:
    keys = chunk_keys(PROMPT)
    for engine in range(MOST_ENGINES):
        prefixes.add(keys, engine)
        seen = engine + 1
        assert prefixes.known(keys, MOST_ENGINES) == [10 * CHUNK] * seen + [0] * (MOST_ENGINES - seen)


def test_a_slot_that_was_overwritten_is_not_mistaken(prefixes: Prefixes) -> None:
    (key,) = chunk_keys(PROMPT[:CHUNK])
    same_slot = key ^ 1 << 63
    assert key % SLOTS == same_slot % SLOTS
    prefixes.add([key], 0)
    assert prefixes.known([same_slot], 2) == [0, 0]
    prefixes.add([same_slot], 1)
    assert prefixes.known([same_slot], 2) == [0, CHUNK]
    assert prefixes.known([key], 2) == [0, 0]


def test_another_process_sees_what_this_one_has_sent(prefixes: Prefixes, tmp_path: Path) -> None:
    prefixes.add(chunk_keys(PROMPT), 1)
    program = (
        "import sys; from flightline.torch_engine.process.prefixes import Prefixes, chunk_keys\n"
        "table, prompt = Prefixes(sys.argv[1]), eval(sys.argv[2])\n"
        "print(table.known(chunk_keys(prompt), 2)); table.add(chunk_keys(prompt), 0)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "prefixes"), str(PROMPT)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.strip() == str([0, 10 * CHUNK])
    assert prefixes.known(chunk_keys(PROMPT), 2) == [10 * CHUNK] * 2


def test_keys_are_of_the_tokens_whatever_holds_them() -> None:
    assert chunk_keys(PROMPT) == chunk_keys(tuple(PROMPT)) == chunk_keys(np.array(PROMPT, np.int32))
    assert len(set(chunk_keys([7] * 20 * CHUNK))) == 20
