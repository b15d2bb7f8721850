"""``make bench``: both endpoints under the same load, in turns, and a report with the comparison.

``python -m loadtest.bench [--url HOST:PORT] [--concurrency 16] [--output-tokens 64] [--budget-s 330] ...``

Exit status: 0 the run is VALID, 1 it is INVALID, UNSTEADY or could not be done, 2 a setting is wrong, 130 Ctrl-C.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from client import ClientError
from client.sync import Client
from loadtest import audit, conditions, plot
from loadtest.config import COMPARISON, BenchConfig, ConfigError
from loadtest.metrics import Summary, limits, problems, ratio, steady_window, summarise
from loadtest.plan import Block, neighbours, plan_blocks, planned_s, too_short
from loadtest.prompts import Prompts
from loadtest.records import CLIENTS, ClientSample, RequestRecord, read_clients, read_records
from loadtest.report import BlockResult, Report, number, publish, table
from loadtest.target import Target, TargetError, target
from loadtest.telemetry import Sampler
from loadtest.trial import LOCUST_LOG, LOCUSTFILE, RECORDS, USER_CLASSES
from loadtest.warmup import wait_until_idle, warm_up

GONE_TRIES, GONE_PAUSE_S = 3, 0.5
STEADY_SPREAD = 1.3
"""Most that the fastest of an endpoint's blocks may have over the slowest."""


class BenchError(Exception):
    """The run cannot go on; one line that says why."""


def main(arguments: list[str] | None = None) -> int:
    try:
        config = BenchConfig.from_arguments(sys.argv[1:] if arguments is None else arguments)
        prompts = Prompts(config.seed, config.prompts)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server too
    try:
        return run(config, prompts)
    except (BenchError, TargetError, ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped: no report was written", file=sys.stderr)
        return 130


def run(config: BenchConfig, prompts: Prompts) -> int:
    """Server, warm-up, blocks, report; returns the exit status."""
    reports = Path(config.reports).resolve()
    config = config.with_budget()
    say(f"BUDGET_S={config.budget_s:g}")
    deadline = time.monotonic() + config.budget_s
    reports.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".running-", dir=reports))
    work.chmod(0o755)
    try:
        with target(config.url, config.build_dir, say) as server:
            report = measure(config, prompts, server, work, deadline)
        if report.valid:
            plot.comparison(report, work / COMPARISON)
        folder = publish(work, reports, report, datetime.now().strftime("%Y-%m-%dT%H-%M-%S"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{table(report)}\n\n{report.verdict}\nreport: {folder / 'report.md'}")
    return 0 if report.valid else 1


def measure(config: BenchConfig, prompts: Prompts, server: Target, work: Path, deadline: float) -> Report:
    """Runs the blocks; a failure on the way makes the report INVALID instead of losing what was measured.

    Args:
        deadline: of the last block, on the monotonic clock; kept unless the shortest plan does not fit.
    """
    endpoints = (config.candidate, config.baseline)
    for endpoint in endpoints:
        with Client(server.url, endpoint) as client:
            client.check_ready()
    with Sampler(server.pids) as sampler:
        paces = {}
        for endpoint in endpoints:
            pace = warm_up(server.url, endpoint, prompts, config.concurrency, config.output_tokens)
            wait_until_idle(server.url, endpoint)
            paces[endpoint] = pace
            say(f"warm-up of {endpoint}: {config.concurrency} requests take about {number(pace.wave_s)} s")
        left = deadline - time.monotonic()
        blocks = plan_blocks(*endpoints, paces, config.concurrency, left)
        say(f"plan: {', '.join(f'{b.endpoint} {b.seconds} s' for b in blocks)}: {planned_s(blocks):.0f} s")
        if planned_s(blocks) > left + 1:
            say(
                f"one short round does not fit BUDGET_S={config.budget_s:g} at this load; it is done all the same"
            )
        for name in too_short(blocks, paces):
            latency = number(paces[name].wave_s)
            say(f"BUDGET_S={config.budget_s:g} is too short for latencies of {name} (about {latency} s each)")
        failure = run_blocks(blocks, config, server.url, work)
        records, clients = read_records(work / RECORDS), read_clients(work / CLIENTS)
        return evaluate(config, prompts, server, blocks, records, sampler, failure, clients)


def run_blocks(blocks: list[Block], config: BenchConfig, url: str, work: Path) -> str | None:
    """Returns why it had to stop early, if it had to."""
    used: Counter[str] = Counter()
    for block in blocks:
        try:
            run_block(block, config, url, work, used[block.endpoint])
            for endpoint in (config.candidate, config.baseline):
                wait_until_idle(url, endpoint)
        except BenchError as error:
            return f"block {block.name}: {error}"
        except ClientError as error:
            return f"block {block.name}: {told_plainly(url, block.endpoint, error)}"
        records = [record for record in read_records(work / RECORDS) if record.block == block.name]
        used[block.endpoint] += len(records)
        summary = summarise(block.endpoint, [records])
        say(
            f"block {block.name}: {number(summary.output_tokens_per_s)} tokens/s, "
            f"latency p50 {number(summary.e2e_s.p50)} s (n={summary.e2e_s.n})"
        )
    return None


def told_plainly(url: str, endpoint: str, error: ClientError) -> str:
    """``error``, or that there is no server any more.

    gRPC words the end of a server in many ways, by what reached the client first: a call cancelled, a connection reset
    or refused. What counts is whether anybody answers now.
    """
    for _ in range(GONE_TRIES):
        try:
            with Client(url, endpoint) as client:
                client.check_ready()
        except ClientError:
            return f"the server died: no server at {url} answers any more ({error})"
        time.sleep(GONE_PAUSE_S)  # it may be closing
    return str(error)


def run_block(block: Block, config: BenchConfig, url: str, work: Path, first_prompt: int) -> None:
    """One headless Locust run, in a process of its own."""
    options = {
        "-f": LOCUSTFILE,
        "--host": url,
        "-u": config.concurrency,
        "-r": config.concurrency,
        "-t": block.seconds,
        "--output-tokens": config.output_tokens,
        "--prompts": Path(config.prompts).resolve() if config.prompts else "",
        "--seed": config.seed,
        "--first-prompt": first_prompt,
        "--records": work / RECORDS,
        "--block": block.name,
        "--exit-code-on-error": 0,  # the records tell what failed
    }
    command = [sys.executable, "-m", "loadtest.locust_main", "--headless", "--only-summary"]
    command += [
        f"{name}={value}" if name.startswith("--") else f"{name}{value}" for name, value in options.items()
    ]
    with (work / LOCUST_LOG).open("a", encoding="utf-8") as log:
        try:
            subprocess.run(
                [*command, USER_CLASSES[block.endpoint]],
                cwd=conditions.PROJECT,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
                timeout=block.seconds + 60,
            )
        except subprocess.CalledProcessError as error:
            log.flush()
            last = (work / LOCUST_LOG).read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise BenchError(f"Locust ended with status {error.returncode}: {''.join(last)}") from None
        except subprocess.TimeoutExpired:
            raise BenchError("Locust did not end in time") from None


def evaluate(
    config: BenchConfig,
    prompts: Prompts,
    server: Target,
    blocks: list[Block],
    records: list[RequestRecord],
    sampler: Sampler,
    failure: str | None = None,
    clients: Sequence[ClientSample] = (),
) -> Report:
    """The report on what was recorded."""
    by_block = {block.name: [record for record in records if record.block == block.name] for block in blocks}

    def pooled(endpoint: str) -> Summary:
        return summarise(endpoint, [by_block[block.name] for block in blocks if block.endpoint == endpoint])

    candidate, baseline = pooled(config.candidate), pooled(config.baseline)
    each = {block.name: summarise(block.endpoint, [by_block[block.name]]) for block in blocks}
    pairs = [(each[a.name], each[b.name]) for a, b in neighbours(blocks, config.candidate)]
    utilisation = {}
    reasons = problems(records, [candidate, baseline])
    for summary in (candidate, baseline):
        mine = [by_block[block.name] for block in blocks if block.endpoint == summary.endpoint]
        windows = [window for answered in mine if (window := steady_window(answered))]
        utilisation[summary.endpoint] = sampler.over(windows)
        health = audit.ClientHealth.of(clients, [record for answered in mine for record in answered], windows)
        reasons += [f"{summary.endpoint}: {why}" for why in audit.client_reasons(health, summary, None)]
    for name, answered in by_block.items():
        reasons += audit.server_reasons(name, answered, unique=prompts.count is None)
    return Report(
        unsteady=unsteady(each[block.name] for block in blocks),
        reasons=[failure, *reasons] if failure else reasons,
        limits=limits([candidate, baseline]),
        candidate=candidate,
        baseline=baseline,
        ratios={
            "throughput": ratio(
                candidate.output_tokens_per_s,
                baseline.output_tokens_per_s,
                [(a.output_tokens_per_s, b.output_tokens_per_s) for a, b in pairs],
            ),
            "e2e_p50": ratio(
                baseline.e2e_s.p50, candidate.e2e_s.p50, [(b.e2e_s.p50, a.e2e_s.p50) for a, b in pairs]
            ),
            "ttft_p50": ratio(
                baseline.ttft_s.p50, candidate.ttft_s.p50, [(b.ttft_s.p50, a.ttft_s.p50) for a, b in pairs]
            ),
            "tpot_p50": ratio(
                baseline.tpot_s.p50, candidate.tpot_s.p50, [(b.tpot_s.p50, a.tpot_s.p50) for a, b in pairs]
            ),
        },
        utilisation=utilisation,
        blocks=[BlockResult(block.name, block.seconds, each[block.name]) for block in blocks],
        conditions=conditions.gather(config, sampler.gpus, server.deployment),
        notes=notes(prompts, records, sampler),
    )


def unsteady(summaries: Iterable[Summary]) -> list[str]:
    """Endpoints whose blocks, under the same load, differ by more than :data:`STEADY_SPREAD`, with their figures."""
    rates: dict[str, list[float]] = {}
    for summary in summaries:
        if summary.output_tokens_per_s:
            rates.setdefault(summary.endpoint, []).append(summary.output_tokens_per_s)
    return [
        f"the blocks of {endpoint} gave {', '.join(number(rate) for rate in found)} tokens/s, a spread of "
        f"{max(found) / min(found):.2f} (at most {STEADY_SPREAD} is steady): see what else runs here, and run again"
        for endpoint, found in rates.items()
        if max(found) > STEADY_SPREAD * min(found)
    ]


def notes(prompts: Prompts, records: list[RequestRecord], sampler: Sampler) -> list[str]:
    """What a reader should know besides."""
    lines = []
    used = max((record.prompt_index for record in records), default=0) + 1
    if prompts.count is not None and used > prompts.count:
        repeated = f"{used} prompts were needed and the file has {prompts.count}"
        lines.append(f"{repeated}: repeated ones may come from a prefix cache.")
    if sampler.gpus.missing:
        lines.append(f"GPU utilisation is n/a: {sampler.gpus.missing}.")
    return lines


def say(text: str) -> None:
    print(f"bench: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
