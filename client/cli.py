"""One answer of a running server, a stream, or a conversation on the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Generator
from typing import Any

from flightline.client import wire
from flightline.client.errors import ClientError
from flightline.client.params import DECLARED, Declaration, GenerateParams
from flightline.client.results import Chunk, Generation
from flightline.client.sync import Client

KINDS: dict[str, Callable[[str], object]] = {"INT32": int, "UINT64": int, "FP32": float, "BYTES": str}
FIXED = (
    "exclude_input_in_output",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_perf_metrics",
)
"""Fields of ``GenerateParams`` without a flag."""


def parser() -> argparse.ArgumentParser:
    command = sys.argv[0] if sys.argv[0].startswith("flightline ") else "python -m flightline.client"
    result = argparse.ArgumentParser(prog=command, description=__doc__)
    add_arguments(result)
    return result


def add_arguments(result: argparse.ArgumentParser) -> None:
    result.add_argument("prompt", nargs="?", help="text to continue; with --chat, what the user says")
    result.add_argument(
        "--chat", action="store_true", help="apply the chat template; without a prompt, converse"
    )
    result.add_argument("--system", help="system message of the chat")
    result.add_argument("--stream", action="store_true", help="print the text as it is generated")
    result.add_argument("--json", action="store_true", help="print the answer with counts and times as JSON")
    result.add_argument("--model", default=wire.TEXT_GENERATION, help="%(default)s, ensemble or hf_baseline")
    result.add_argument(
        "--url",
        default=wire.default_url(),
        help="gRPC address (default %(default)s, or of FLIGHTLINE_GRPC_PORT)",
    )
    result.add_argument(
        "--model-dir", help="checkpoint folder with the chat template (default: the deployed one)"
    )
    result.add_argument("--timeout", type=float, help="seconds until a call is given up")
    sampling = result.add_argument_group(
        "generation (server's default unless given; what is told beside the text is shown with --json)"
    )
    for name, declared in DECLARED.items():
        if name not in FIXED:
            _add_flag(sampling, name, declared)


def _add_flag(group: Any, name: str, declared: Declaration) -> None:
    """The flag of one parameter: a switch turns it over, a list's may be repeated."""
    flag, help_ = "--" + name.replace("_", "-"), declared.what or None
    if declared.wire_type == "BOOL":
        flag = flag if not declared.default else "--no-" + flag.removeprefix("--")
        group.add_argument(flag, dest=name, action="store_const", const=not declared.default, help=help_)
        return
    kind = KINDS[declared.wire_type]
    if not declared.many:
        group.add_argument(flag, type=kind, help=help_)
        return
    metavar = "WORD" if kind is str else "N"
    group.add_argument(
        flag, type=kind, action="append", metavar=metavar, help=f"{declared.what}; may be repeated"
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 after an error (one line on stderr), 130 after Ctrl-C."""
    args = parser().parse_args(arguments)
    if args.prompt is None and not args.chat:
        parser().error("give a prompt, or --chat for a conversation")
    if (args.num_return_sequences or 1) > 1 and (args.prompt is None or (args.stream and not args.json)):
        parser().error("--num-return-sequences needs a prompt, and --json with --stream: texts would mix")
    try:
        params = _params(args)
        with Client(args.url, args.model, timeout_s=args.timeout, model_dir=args.model_dir) as client:
            if args.prompt is None:
                return converse(client, params, args.system)
            return answer(client, params, args)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _params(args: argparse.Namespace) -> GenerateParams:
    names = {field.name for field in dataclasses.fields(GenerateParams)}
    return GenerateParams(**{k: v for k, v in vars(args).items() if k in names and v is not None})


def answer(client: Client, params: GenerateParams, args: argparse.Namespace) -> int:
    """One prompt, one answer."""
    prompt = client.render_chat(_conversation(args.system, args.prompt)) if args.chat else args.prompt
    if not args.stream:
        answers = client.generate_all(prompt, params)
        for generation in answers:
            if generation.error is not None:
                print(f"error: {generation.error}", file=sys.stderr)
            print(_as_json(generation) if args.json else generation.text)
        return int(any(generation.error for generation in answers))
    stream = client.generate_stream(prompt, params)
    if args.json:
        for chunk in stream:
            print(_as_json(chunk), flush=True)
    else:
        _print_stream(stream)
    return 0


def converse(client: Client, params: GenerateParams, system: str | None) -> int:
    """Reads, answers and remembers until Ctrl-D; Ctrl-C cancels the answer, not the conversation."""
    client.check_ready()
    client.render_chat(_conversation(system, "hello"))  # a missing template is told before the first question
    history = _conversation(system)
    print(
        f"Chat with {client.model} at {client.url}. Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr
    )
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return 0
        if not question:
            continue
        history.append({"role": "user", "content": question})
        try:
            text = _print_stream(client.chat_stream(history, params))
        except ClientError as error:
            print(f"error: {error}", file=sys.stderr)
            history.pop()
            continue
        history.append({"role": "assistant", "content": text})


def _conversation(system: str | None, question: str | None = None) -> list[dict[str, str]]:
    turns = (("system", system), ("user", question))
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def _print_stream(chunks: Generator[Chunk, None, None]) -> str:
    """Prints the text as it comes and returns it; Ctrl-C ends it early and cancels the request."""
    parts: list[str] = []
    try:
        for chunk in chunks:
            parts.append(chunk.text)
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        chunks.close()
        print(" [cancelled]", end="", file=sys.stderr)
    print(flush=True)
    return "".join(parts)


def _as_json(value: Chunk | Generation) -> str:
    shown = dataclasses.asdict(dataclasses.replace(value, error=None))
    return json.dumps(shown | {"error": value.error and str(value.error)}, ensure_ascii=False)
