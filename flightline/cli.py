"""``flightline COMMAND``: one program for all there is. A command's own code is imported only when it is run."""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flightline import __version__
from flightline.settings import SettingsError, add_flags, given_flags, load

COMMAND_WIDTH = 12
SHELLS = ("bash", "zsh", "tcsh")


@dataclass(frozen=True)
class Command:
    """A module that is run as a program."""

    about: str
    module: str
    arguments: tuple[str, ...] = ()
    """They come before the user's."""
    builds: bool = False
    """What is not built yet is built before; the options of ``build`` are taken, too."""


COMMANDS = {
    "preflight": Command(
        "what this machine can run, in seconds and before anything is built",
        "flightline.supervisor.preflight",
    ),
    "build": Command("checkpoint to engine and model repository (cached)", "flightline.engine_build"),
    "serve": Command(
        "build what is not built yet and serve it on Triton", "flightline.supervisor.serve", builds=True
    ),
    "chat": Command("talk to the model of a running server", "flightline.client", ("--chat",)),
    "generate": Command("one answer of a running server, whole or streamed", "flightline.client"),
    "loadtest": Command(
        "load on a server: run, compare, sweep, search, calibrate, worker, ui", "flightline.loadtest"
    ),
    "bench": Command(
        "build, serve, load both endpoints and write the comparison to reports/",
        "flightline.loadtest",
        ("bench",),
        builds=True,
    ),
    "verify": Command(
        "on a machine with a GPU: confirm what could only be checked against facts",
        "flightline.supervisor.verify_gpu_host",
    ),
}
COMPLETION = "completion"
HELP = f'print what a shell needs to complete these: eval "$(flightline {COMPLETION} bash)"; also zsh, tcsh'


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status, or leaves with it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = _parser().parse_args(words[:1]).command, words[1:]
    if name == COMPLETION:
        return _completion(rest)
    command = COMMANDS[name]
    if command.builds and not _helps(rest) and _needs_build(rest):
        ours, rest = _for_build(rest)
        status = _build(ours) if _can_start(name, rest) else 0
        if status:
            return status
    sys.argv = [f"flightline {name}", *command.arguments, *rest]
    runpy.run_module(command.module, run_name="__main__")
    return 0


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<{COMMAND_WIDTH}}{command.about}" for name, command in COMMANDS.items()]
    lines.append(f"  {COMPLETION:<{COMMAND_WIDTH}}{HELP}")
    parser = argparse.ArgumentParser(
        prog="flightline",
        usage="flightline [-h] [--version] COMMAND ...",
        description="LLM serving on NVIDIA Triton with the proof beside it.",
        epilog="\n".join(["commands (each says its options with --help):", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flightline {__version__}")
    parser.add_argument("command", choices=(*COMMANDS, COMPLETION), metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _helps(arguments: Sequence[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _needs_build(arguments: Sequence[str]) -> bool:
    """Not to stop a server, nor to load one that runs."""
    elsewhere = any(word == "--url" or word.startswith("--url=") for word in arguments)
    elsewhere = elsewhere or any(os.environ.get(name) for name in ("FLIGHTLINE_URL", "URL"))
    return "--stop" not in arguments and not elsewhere


def _for_build(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the arguments that are for the build, and the others with the build folder."""
    from flightline.engine_build.settings import Settings

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(parser, Settings)
    ours, rest = parser.parse_known_args(list(arguments))
    return given_flags(ours, Settings), rest + ([f"--build-dir={ours.build_dir}"] if ours.build_dir else [])


def _can_start(name: str, arguments: list[str]) -> bool:
    """Else there is nothing to build for: the command itself says what is wrong, and not after minutes."""
    from flightline.supervisor import settings as serve
    from flightline.supervisor.errors import ServeError

    try:
        if name == "serve":
            serve.parse(arguments)
        else:
            from flightline.loadtest.options import BenchOptions

            load(BenchOptions, f"flightline {name}", arguments)
    except (ServeError, SettingsError):
        return False
    return True


def _build(arguments: list[str]) -> int:
    """The exit status of a build.

    A process of its own: what a build leaves in memory and in its environment must not reach a server.
    """
    build = subprocess.Popen([sys.executable, "-m", COMMANDS["build"].module, *arguments])
    stops = {
        signal.SIGTERM: lambda *_: build.terminate(),
        signal.SIGINT: lambda *_: None,  # the terminal sends it to the build too, which ends by it
    }
    before = {number: signal.signal(number, handler) for number, handler in stops.items()}
    status = build.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _completion(arguments: Sequence[str]) -> int:
    import shtab

    parser = argparse.ArgumentParser(prog=f"flightline {COMPLETION}", description=HELP)
    parser.add_argument("shell", choices=SHELLS)
    print(shtab.complete(whole_parser(), shell=parser.parse_args(arguments).shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands with all their options, for completion."""
    from flightline.client import cli as client
    from flightline.engine_build.settings import Settings
    from flightline.loadtest.__main__ import COMMANDS as LOADTESTS
    from flightline.loadtest.options import BenchOptions
    from flightline.supervisor import settings as serve

    result = argparse.ArgumentParser(prog="flightline")
    result.add_argument("--version", action="store_true")
    commands = result.add_subparsers()

    def add(name: str, about: str, fill: Callable[[argparse.ArgumentParser], object]) -> None:
        fill(commands.add_parser(name, help=about, description=about))

    fills: dict[str, Callable[[argparse.ArgumentParser], object]] = {
        "preflight": lambda parser: add_flags(parser, Settings),
        "build": lambda parser: add_flags(parser, Settings),
        "serve": lambda parser: serve.add_arguments(parser, Settings),
        "chat": client.add_arguments,
        "generate": client.add_arguments,
        "loadtest": lambda parser: parser.add_argument("test", choices=tuple(LOADTESTS)),
        "bench": lambda parser: add_flags(parser, Settings, BenchOptions),
        COMPLETION: lambda parser: parser.add_argument("shell", choices=SHELLS),
    }
    for name, about in {
        **{name: command.about for name, command in COMMANDS.items()},
        COMPLETION: HELP,
    }.items():
        add(name, about, fills.get(name, lambda parser: None))
    return result
