"""The loader of settings, and the page made of them."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from flightline import settings_page
from flightline.settings import SettingsError, existing_file, load, setting, variables
from flightline.supervisor import serve
from flightline.supervisor.settings import ServeSettings

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Oven:
    """Bakes."""

    cake: str = setting("sponge", "what", choices=("sponge", "pound"))
    eggs: int = setting(2, "how many", least=1, most=12)
    sugar_kg: float = setting(0.2, "how much", least=0)
    tin: Path | None = setting(None, "its drawing", parse=existing_file)
    minutes: int | None = setting(None, "how long")
    light: bool = setting(True, "switch the light on", variable="LAMP")
    timer: bool = setting(False, "ring", variable="")
    place: str = setting("kitchen", "where", short=False)


def oven(*arguments: str) -> Oven:
    return load(Oven, "oven", arguments)


def test_command_line_before_long_before_short_name_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert oven() == Oven()
    monkeypatch.setenv("EGGS", "3")
    assert oven().eggs == 3
    monkeypatch.setenv("FLIGHTLINE_EGGS", "4")
    assert oven().eggs == 4
    assert oven("--eggs", "5").eggs == 5
    monkeypatch.setenv("FLIGHTLINE_EGGS", "")
    assert oven().eggs == 3
    assert oven("--minutes", "7", "--sugar-kg=1e-1") == Oven(eggs=3, minutes=7, sugar_kg=0.1)


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (oven().light, oven("--no-light").light, oven("--light", "0").light) == (True, False, False)
    assert (oven().timer, oven("--timer").timer) == (False, True)
    monkeypatch.setenv("LAMP", "0")
    monkeypatch.setenv("TIMER", "1")
    assert oven() == Oven(light=False)
    assert oven("--light").light


def test_a_name_that_others_set_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "x86_64-conda-linux-gnu")
    assert oven().place == "kitchen"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cake", "mud"], "CAKE='mud' is not valid: use one of sponge, pound"),
        (["--eggs", "13"], "EGGS='13' is not valid: use a whole number from 1 to 12"),
        (["--eggs", "1_0"], "EGGS='1_0' is not valid: use a whole number from 1 to 12"),
        (["--eggs", "9" * 5000], "is not valid: use a whole number from 1 to 12"),
        (["--minutes", "1.5"], "MINUTES='1.5' is not valid: use a whole number"),
        (["--sugar-kg", "nan"], "SUGAR_KG='nan' is not valid: use a number of at least 0"),
        (["--sugar-kg=-1"], "SUGAR_KG='-1' is not valid: use a number of at least 0"),
        (["--tin", "/nowhere"], "TIN='/nowhere' is not valid: there is no such file"),
        (["--light", "dim"], "LAMP='dim' is not valid: use 0 or 1"),
        (["--timer", "yes"], "--timer='yes' is not valid: use 0 or 1"),
    ],
)
def test_one_line_with_name_value_and_remedy(arguments: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(says)):
        oven(*arguments)


def test_no_name_means_two_things() -> None:
    """``make`` gives a variable to every command: it is one field in one of them; all share the folder."""
    meanings: dict[str, set[tuple[str, str]]] = {}
    for command, cls in settings_page.COMMANDS.items():
        for field in settings_page.settings.fields(cls):
            for name in variables(field):
                meanings.setdefault(name, set()).add((command.split()[1].rstrip(":"), field.name))
    shared = {name for name, meant in meanings.items() if len(meant) > 1}
    assert shared == {"FLIGHTLINE_BUILD_DIR", "BUILD_DIR"}


def made(target: str, *variables: str, **environment: str) -> list[str]:
    """The environment that ``make`` gives a target's command, which is replaced."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-f", "-", target, *variables],
        input=f"include {ROOT}/Makefile\nshow: ; @env\n",
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_make_passes_its_variables_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``make serve BUILD_DIR=x`` serves x; HOST counts only where it was meant for us."""
    build_dir = str(tmp_path / "x")
    lines = made(
        "show",
        f"BUILD_DIR={build_dir}",
        "SERVE_BASELINE=0",
        "HOST=0.0.0.0",
        "ALLOW_NO_KEY=1",
        HTTP_PORT="9000",
    )
    for line in lines:
        name, _, value = line.partition("=")
        if name not in ("PATH", "PWD", "SHLVL", "_"):
            monkeypatch.setenv(name, value)
    served = ServeSettings.from_environment()
    assert (str(served.build_dir), served.baseline) == (build_dir, False)
    assert (served.host, served.http_port) == ("0.0.0.0", 9000)
    assert not [line for line in made("show", HOST="x86_64-conda-linux-gnu") if "FLIGHTLINE_HOST" in line]


def test_serve_reads_the_build_folder_of_make(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BUILD_DIR", str(tmp_path))
    assert serve.main([]) == 1
    assert f"{tmp_path}/deployment.json does not exist" in capsys.readouterr().err
    assert serve.main(["--http-port", "99999"]) == 1
    assert "HTTP_PORT='99999' is not valid: use a whole number from 0 to 65535" in capsys.readouterr().err
