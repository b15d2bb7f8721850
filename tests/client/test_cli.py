from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from flightline.client import Client
from flightline.client.cli import main
from tests.client.test_chat_template import CHATML, save_model
from tests.client.waiting import eventually


def test_one_shot_and_stream_print_the_same(server, capsys):
    flags = ["hello", "--url", server.url, "--max-tokens", "3"]
    assert main(flags) == 0
    assert main([*flags, "--stream"]) == 0
    assert capsys.readouterr().out == " word word word\n" * 2


def test_json(server, capsys):
    assert main(["hello", "--url", server.url, "--max-tokens", "3", "--json", "--seed", "7"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["num_output_tokens"], answer["finish_reason"]) == (3, "length")
    assert server.log[0].inputs["seed"] == 7


def test_every_parameter_has_a_flag(server, capsys):
    flags = ["--min-p", "0.5", "--stop-token-ids", "7", "--ignore-eos", "--no-skip-special-tokens"]
    flags += [
        "--logit-bias-ids",
        "3",
        "--logit-bias-weights=-inf",
        "--top-logprobs",
        "2",
        "--stop-words",
        "a",
    ]
    assert main(["hello", "--url", server.url, "--max-tokens", "1", *flags]) == 0
    inputs = server.log[0].inputs
    assert (inputs["min_p"], inputs["stop_token_ids"], inputs["ignore_eos"]) == (0.5, [7], True)
    assert (inputs["skip_special_tokens"], inputs["logit_bias_weights"]) == (False, float("-inf"))
    assert (inputs["top_logprobs"], inputs["stop_words"]) == (2, ["a"])
    with pytest.raises(SystemExit):
        main(["hello", "--stream", "--num-return-sequences", "2"])
    assert "texts would mix" in capsys.readouterr().err


def test_errors_are_one_line(server, capsys):
    assert main(["hello", "--url", "127.0.0.1:9"]) == 1
    assert main(["hello", "--url", server.url, "--max-tokens", "0"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


def test_a_prompt_is_needed(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "--chat" in capsys.readouterr().err


def test_a_conversation_remembers_and_ends_with_the_input(server, tmp_path):
    save_model(tmp_path, CHATML, True)
    command = [sys.executable, "-m", "flightline.client", "--chat", "--url", server.url, "--max-tokens", "2"]
    done = subprocess.run(
        [*command, "--model-dir", tmp_path],
        input="first\nsecond\n",
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout.count(" word word\n")) == (0, 2), done.stderr
    second = server.log[1].inputs["text_input"]
    assert second.index("first") < second.index(" word word") < second.index("second")


def test_ctrl_c_stops_the_answer_and_not_the_conversation(slow_server, tmp_path):
    save_model(tmp_path, CHATML, True)
    command = [
        sys.executable,
        "-m",
        "flightline.client",
        "--chat",
        "--url",
        slow_server.url,
        "--max-tokens",
        "1000",
    ]
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*command, "--model-dir", tmp_path], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        os.write(controller, b"hello\n")
        assert eventually(lambda: bool(slow_server.log and slow_server.log[0].token_times_ns))
        process.send_signal(signal.SIGINT)
        assert eventually(lambda: slow_server.log[0].outcome == "cancelled")
        os.write(controller, b"again\n")
        assert eventually(lambda: len(slow_server.log) == 2 and bool(slow_server.log[1].token_times_ns))
        process.send_signal(signal.SIGINT)
        assert eventually(lambda: slow_server.log[1].outcome == "cancelled")
        os.write(controller, b"\x04")
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.communicate()
        os.close(controller)
        os.close(terminal)


def test_the_port_that_the_server_was_given(server, capsys, monkeypatch) -> None:
    """``make serve GRPC_PORT=...`` and then ``make chat GRPC_PORT=...``; the library follows, too."""
    monkeypatch.setenv("GRPC_PORT", server.url.split(":")[1])
    assert main(["hello", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out
    with Client() as llm:
        assert llm.url == server.url
        llm.check_ready()
