"""What is asked: prompts and answer lengths, reproducible from a seed, the same for every endpoint.

Prompts differ in their first KV block, unless the workload is one that shares prefixes and says so.
Lengths of generated prompts are aimed at with words that are one token in nearly every vocabulary; what
is reported is the server's own count.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from flightline.loadtest.prompts import NAMES, Prompts, split_table
from flightline.settings import SettingsError

WORDS = split_table("""
time| year| people| way| day| man| thing| woman| life| child| world| school| state| family| student| group|
country| problem| hand| part| place| case| week| company| system| program| question| work| night| point|
home| water| room| mother| area| money| story| fact| month| lot| right| study| book| eye| job| word|
business| issue| side| kind| head| house| service| friend| father| power| hour| game| line| end| member|
law| car| city| name| team| minute| idea| body| back| face| door| health| person| art| war| history| party|
result| change| morning| reason| research| girl| guy| moment| air| teacher| force| education| foot| boy|
age| policy| music| market| sense| nation| plan| college| interest| death| experience| effect| use| class|
control| field| light| road| river| garden| winter| summer| paper| table| window| letter| picture| voice|
mountain| train| island| silver| forest
""")


@dataclass(frozen=True)
class Ask:
    """One request to be made."""

    prompt: str
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens."""

    text: str
    kind: str
    a: float
    b: float = 0.0
    longest: int = 1_000_000

    @classmethod
    def parse(cls, name: str, text: str) -> Lengths:
        """``64``, ``uniform:32:128``, ``normal:MEAN:STD`` or ``lognormal:MEDIAN:SIGMA``; ``<=N`` cuts off.

        Raises:
            SettingsError: not such a text.
        """
        main, _, longest = text.partition("<=")
        kind, *values = main.split(":") if ":" in main else ("fixed", main)
        wanted = {"fixed": 1, "uniform": 2, "normal": 2, "lognormal": 2}
        try:
            a, b = (float(value) for value in (*values, "0")[:2])
            lengths = cls(text, kind, a, b, int(longest or cls.longest))
            ok = wanted.get(kind) == len(values) and a >= 1 and b >= 0 and lengths.longest >= 1
            ok = ok and (kind != "uniform" or b >= a) and (kind != "fixed" or a % 1 == 0)
        except ValueError:
            ok = False
        if not ok:
            remedy = "use tokens like 64, uniform:32:128, normal:128:32, lognormal:200:0.6 or lognormal:200:0.6<=1000"
            raise SettingsError(f"{name}={text!r} is not valid: {remedy}")
        return lengths

    def draw(self, rng: random.Random) -> int:
        if self.kind == "uniform":
            value = rng.uniform(self.a, self.b)
        elif self.kind == "normal":
            value = rng.gauss(self.a, self.b)
        elif self.kind == "lognormal":
            value = self.a * math.exp(rng.gauss(0.0, self.b))
        else:
            value = self.a
        return max(1, min(self.longest, round(value)))


@dataclass(frozen=True)
class Preset:
    """A named shape of use; lengths that the user gives go before its own."""

    about: str
    input_tokens: str = ""
    output_tokens: str = "64"
    prefix_tokens: int = 0
    prefixes: int = 1
    turns: int = 1


PRESETS = {
    "short": Preset("short questions of 40 to 80 tokens in plain English"),
    "chat": Preset("chat-like: lengths spread as in shared conversations", "lognormal:180:0.8<=1500",
                   "lognormal:200:0.6<=1000"),
    "summarise": Preset("summarisation-like: long in, short out", "lognormal:900:0.4<=3000", "normal:128:32"),
    "prefix": Preset("four system prompts of 200 tokens shared by all requests", "56", "64", 200, 4),
    "turns": Preset("conversations of four turns, each sent with all that was said before", "40", "64", turns=4),
}  # fmt: skip


@dataclass(frozen=True)
class WorkloadSpec:
    """What the options say; checked by :meth:`Workload.of`."""

    name: str = "short"
    input_tokens: str = ""
    output_tokens: str = ""
    prompts: str = ""
    seed: int = 0
    turns: int = 0


class Workload:
    """An endless series of requests by index."""

    def __init__(self, spec: WorkloadSpec, preset: Preset) -> None:
        self.spec = spec
        self.preset = preset
        self.turns = spec.turns or preset.turns
        self._prompts = Prompts(spec.seed, spec.prompts)
        text = spec.input_tokens or preset.input_tokens
        self._inputs = Lengths.parse("INPUT_TOKENS", text) if text and not spec.prompts else None
        self._outputs = Lengths.parse("OUTPUT_TOKENS", spec.output_tokens or preset.output_tokens)

    @classmethod
    def of(cls, spec: WorkloadSpec) -> Workload:
        """Raises SettingsError: an unknown workload, lengths that cannot be, a file that cannot be read."""
        if spec.name not in PRESETS:
            raise SettingsError(f"WORKLOAD={spec.name!r} is not valid: use one of {', '.join(PRESETS)}")
        return cls(spec, PRESETS[spec.name])

    @property
    def distinct(self) -> int | None:
        """Number of different prompts; None = endless."""
        return self._prompts.count

    @property
    def shares_prefixes(self) -> bool:
        """A prefix cache is meant to help."""
        return self.preset.prefix_tokens > 0 or self.turns > 1

    @property
    def typical_output(self) -> int:
        """Median length of an answer."""
        rng = random.Random(0)
        return sorted(self._outputs.draw(rng) for _ in range(101))[50]

    def describe(self) -> str:
        about = f"prompts of {self.spec.prompts}" if self.spec.prompts else self.preset.about
        if self._inputs and not self.preset.input_tokens:  # lengths that the preset's own prompts do not have
            about = "plain English words, no two prompts alike"
        lengths = f"input {self._inputs.text}, " if self._inputs else ""
        turns = f", {self.turns} turns" if self.turns > 1 else ""
        return f"{about} ({lengths}output {self._outputs.text} tokens{turns})"

    def prompt(self, index: int) -> str:
        """Of a request, without its length."""
        return self[index].prompt

    def __getitem__(self, index: int) -> Ask:
        rng = random.Random(f"{self.spec.seed}/{index}/lengths")
        output_tokens = self._outputs.draw(rng)
        if self._inputs is None:
            return Ask(self._prompts[index], output_tokens)
        prompt = text_of(f"{self.spec.seed}/{index}", self._inputs.draw(rng))
        if self.preset.prefix_tokens:
            pool = rng.randrange(self.preset.prefixes)
            prompt = text_of(f"{self.spec.seed}/prefix/{pool}", self.preset.prefix_tokens) + " " + prompt
        return Ask(prompt, output_tokens)


def text_of(seed: str, tokens: int) -> str:
    """About ``tokens`` tokens of text that differs within its first nine words."""
    rng = random.Random(seed)
    opening = [rng.choice(NAMES), *rng.choices(WORDS, k=min(8, max(0, tokens - 1)))]
    return " ".join([*opening, *rng.choices(WORDS, k=max(0, tokens - len(opening)))])


@dataclass(frozen=True)
class TraceRow:
    """A request of a trace, ``at_s`` after its start."""

    at_s: float
    ask: Ask


BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's ``hash_ids`` stands for."""


def read_trace(path: str | Path, seed: int = 0) -> list[TraceRow]:
    """Requests of a JSON-lines trace in the order of their times.

    A row has ``timestamp`` (milliseconds, as in Mooncake's traces) or ``at_s``; ``prompt``, or
    ``input_length`` with or without ``hash_ids`` (shared prefixes in blocks of 512 tokens); and
    ``output_length`` (or ``max_tokens``).

    Raises:
        SettingsError: a row that is not so; the message names its line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"TRACE={path} cannot be read: {error}") from None
    rows = [_trace_row(path, number, line, seed) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise SettingsError(f"TRACE={path} has no requests: give one JSON object a line")
    start = min(row.at_s for row in rows)
    return sorted((TraceRow(row.at_s - start, row.ask) for row in rows), key=lambda row: row.at_s)


def _trace_row(path: str | Path, number: int, line: str, seed: int) -> TraceRow:
    def bad(why: str) -> SettingsError:
        return SettingsError(f"TRACE={path}: line {number}: {why}")

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise bad(f"not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise bad("not a JSON object")

    def value(*names: str) -> float:
        for name in names:
            if name in row:
                if isinstance(row[name], bool) or not isinstance(row[name], int | float):
                    raise bad(f"{name} is {row[name]!r}: it must be a number")
                if not math.isfinite(row[name]) or row[name] < 0:
                    raise bad(f"{name} is {row[name]!r}: it must be 0 or more")
                return row[name]
        raise bad(f"it has no {' or '.join(names)}")

    at_s = value("at_s") if "at_s" in row else value("timestamp") / 1e3
    output_tokens = int(value("output_length", "max_tokens"))
    if output_tokens < 1:
        raise bad("output_length is 0: it must be at least 1")
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise bad(f"prompt is {row['prompt']!r}: it must be a text")
        return TraceRow(at_s, Ask(row["prompt"], output_tokens))
    tokens = int(value("input_length", "input_tokens"))
    words: list[str] = []
    for block in row.get("hash_ids") or []:
        words += text_of(f"{seed}/block/{block}", BLOCK_TOKENS).split()
    words = words[:tokens]
    if len(words) < tokens:
        words += text_of(f"{seed}/row/{number}", tokens - len(words)).split()
    return TraceRow(at_s, Ask(" ".join(words), output_tokens))


def conversation(workload: Workload, index: int) -> Generator[Ask, str, None]:
    """The user's turns of one conversation; ``send`` the model's answer to get the next."""
    said = ""
    for turn in range(workload.turns):
        ask = workload[index * workload.turns + turn]
        said += f"{ask.prompt}\n"
        answer = yield Ask(said, ask.output_tokens)
        said += f"{answer}\n"
