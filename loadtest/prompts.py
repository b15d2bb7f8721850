"""Prompts: unique by construction, the same for every endpoint, reproducible from a seed.

Repeated prompts would be answered from the prefix cache and make any engine look faster than it is.
Generated prompts begin with a number that no other one of the series has, so that not even their first
KV blocks are alike, and read like chat: 40 to 80 tokens of plain English.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from flightline.settings import SettingsError


def split_table(table: str) -> list[str]:
    """Entries between bars."""
    return [" ".join(entry.split()) for entry in table.split("|")]


NAMES = split_table("""
Amara| Bruno| Chen| Dalia| Emil| Farah| Goran| Hana| Ivo| Jana| Kofi| Lena| Mateo| Nadia| Otto|
Priya| Quentin| Rosa| Samir| Tove| Uma| Viktor| Wanda| Xavier| Yuki| Zora
""")
ROLES = split_table("""
a nurse| a retired sailor| a new teacher| the night guard| a bridge engineer| my neighbour| a young
baker| the head gardener| a piano tuner| a bus driver| a travelling vet| a museum guide| a
beekeeper| a potter| an amateur astronomer| the village clerk| a chess coach| a stage painter| a
cheese maker| a tax adviser
""")
TOPICS = split_table("""
how tides follow the moon| why bread rises| how to plan a small garden| what makes a good handover|
how locks on a canal work| why leaves change colour| how to learn a song by ear| how vaccines are
tested| what a fair rota looks like| how to store apples in winter| why old maps are wrong| how
glass is made| how to calm a frightened dog| why steel rusts| how bees find their way home| what to
pack for a long hike| how a sewing machine makes a stitch| why the sky turns red at dusk| how to
read a contract| how to keep a diary for a year| what causes an echo| how to split a bill fairly|
why cats purr| how a rumour spreads| how to choose a bicycle| what makes concrete strong
""")
REQUESTS = split_table("""
Explain {topic} in simple words.| Write a short letter about {topic}.| List five facts about
{topic}.| Give a careful answer on {topic} and add one example.| Describe {topic} to a curious
child.| Compare two opinions on {topic}.| Tell a little story that shows {topic}.| Summarise what is
known on {topic}.
""")
DETAILS = split_table("""
Mention {place} if it helps.| The answer is read aloud in {place}.| It should fit on a card sent
from {place}.| Please start with a question about {place}.| Keep the tone friendly, as people in
{place} would.| Somebody in {place} disagrees, so give reasons.| Use the number {number} somewhere.|
There are {number} listeners, most of them tired.| Finish with a line about {place}.
""")
PLACES = split_table("""
Lisbon| the harbour| a mountain hut| Nairobi| the school kitchen| Oslo| a small library| the bus
station| Kyoto| an island farm| the old theatre| Montevideo| a rainy campsite| Tartu| the market
square| a quiet office
""")


PER_WORKER = 1_000_000
"""Indices of a series that each worker has for itself."""
FIRST_OF_WARM_UP = 1_000_000_000
"""Prompts of warm-up are none of the measured ones, which would then come from the prefix cache."""
NUMBERS = 2**31 - 1
"""A prime: numbers repeat only after so many prompts. At most ten digits, less than a KV block of 16 tokens."""
STRIDE = 1_234_567_891
"""Neighbours begin with other digits."""


def generate(seed: int, index: int) -> str:
    """Prompt number ``index`` of the series ``seed``."""
    number = (random.Random(seed).randrange(NUMBERS) + index * STRIDE) % NUMBERS
    rng = random.Random(f"{seed}/{index}")
    values = {
        "topic": rng.choice(TOPICS),
        "place": rng.choice(PLACES),
        "number": rng.randint(3, 9999),
    }
    name = f"{rng.choice(NAMES)} {rng.choice(NAMES)}"
    opening = f"{number}. {name}, {rng.choice(ROLES)} of {rng.randint(19, 88)}, asks: "
    sentences = [rng.choice(REQUESTS), *rng.sample(DETAILS, rng.randint(1, 3))]
    return opening + " ".join(sentences).format(**values)


class Prompts:
    """An endless series: generated, or a file's prompts round and round."""

    def __init__(self, seed: int = 0, file: str = "") -> None:
        self.seed = seed
        self._from_file = load(Path(file)) if file else None

    def __getitem__(self, index: int) -> str:
        if self._from_file is None:
            return generate(self.seed, index)
        return self._from_file[index % len(self._from_file)]

    @property
    def count(self) -> int | None:
        """Number of distinct prompts; None = endless."""
        return None if self._from_file is None else len(self._from_file)


def load(path: Path) -> Sequence[str]:
    """Prompts of a file: text lines, or JSON lines with ``prompt`` (or ``text_input``) if it ends in .jsonl.

    Raises:
        SettingsError: not readable, or nothing in it.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"PROMPTS={path} cannot be read: {error}") from None
    if path.suffix == ".jsonl":
        lines = [_json_prompt(path, number, line) for number, line in enumerate(lines, 1)]
    if not lines:
        raise SettingsError(f"PROMPTS={path} has no prompts: give one a line")
    return lines


def _json_prompt(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
        prompt = value.get("prompt", value.get("text_input"))
    except (json.JSONDecodeError, AttributeError):
        prompt = None
    if not isinstance(prompt, str):
        raise SettingsError(f'PROMPTS={path}: line {number} is not {{"prompt": "text"}}')
    return prompt
