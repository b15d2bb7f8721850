"""Rendering: nothing unfilled, nothing that Triton cannot parse, never a mix of old and new."""

from __future__ import annotations

from pathlib import Path

import pytest

from flightline.engine_build import repository
from flightline.engine_build.build import TEMPLATES
from flightline.engine_build.errors import BuildError
from flightline.engine_build.plan import make_plan
from tests.engine_build.test_plan import CPU, PAIR, SMALL

CONFIG = 'name: "echo"\nbackend: "${triton_backend}"\nmax_batch_size: ${triton_max_batch_size}\n'
VALUES = {"triton_backend": "python", "triton_max_batch_size": "64"}


def template(folder: Path, config: str = CONFIG, name: str = "echo") -> Path:
    version = folder / name / "1"
    version.mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(config, encoding="utf-8")
    (version / "model.py").write_text("# $not_a_placeholder\n", encoding="utf-8")
    return folder


def test_renders_and_copies(tmp_path: Path) -> None:
    templates = template(tmp_path / "templates")
    (templates / "shared").mkdir()
    (templates / "shared" / "code.py").write_text("", encoding="utf-8")
    target = tmp_path / "repository"
    assert repository.write(repository.render(templates, VALUES), target)
    assert "max_batch_size: 64" in (target / "echo" / "config.pbtxt").read_text()
    assert (target / "echo" / "1" / "model.py").read_text() == "# $not_a_placeholder\n"
    assert [path.name for path in target.iterdir()] == ["echo"]


def test_unchanged_is_left_alone_and_a_damaged_one_is_healed(tmp_path: Path) -> None:
    rendering = repository.render(template(tmp_path / "templates"), VALUES)
    target = tmp_path / "repository"
    repository.write(rendering, target)
    inode = target.stat().st_ino
    (target / "echo" / "1" / "__pycache__").mkdir()
    assert not repository.write(rendering, target)
    assert target.stat().st_ino == inode
    (target / "echo" / "config.pbtxt").write_text("", encoding="utf-8")
    assert repository.write(rendering, target)
    assert "64" in (target / "echo" / "config.pbtxt").read_text()


def test_a_model_without_code_gets_its_version_folder(tmp_path: Path) -> None:
    templates = template(tmp_path / "templates")
    (templates / "echo" / "1" / "model.py").unlink()
    (templates / "echo" / "1").rmdir()
    repository.write(repository.render(templates, VALUES), tmp_path / "repository")
    assert (tmp_path / "repository" / "echo" / "1").is_dir()


def test_unfilled_placeholder(tmp_path: Path) -> None:
    templates = template(tmp_path, CONFIG + "# ${engine_dirr}\n")
    with pytest.raises(
        BuildError, match=r"model_repository/echo/config.pbtxt: nothing fills \$\{engine_dirr\}"
    ):
        repository.render(templates, VALUES)


def test_malformed_placeholder(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"echo/config.pbtxt: a placeholder is malformed"):
        repository.render(template(tmp_path, CONFIG + "# ${}\n"), VALUES)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('name: "echo"\nmax_batch_size: many\n', "echo/config.pbtxt: line 2"),
        ('name: "echo"\n\nmax_batch: 3\n', "echo/config.pbtxt: line 3"),
        ('name: "other"\n', "name is 'other', but the folder is 'echo'"),
    ],
)
def test_what_triton_cannot_read_is_not_written(tmp_path: Path, config: str, says: str) -> None:
    target = tmp_path / "repository"
    repository.write(repository.render(template(tmp_path / "good"), VALUES), target)
    before = (target / "echo" / "config.pbtxt").read_text()
    with pytest.raises(BuildError, match=says):
        repository.write(repository.render(template(tmp_path / "bad", config), VALUES), target)
    assert (target / "echo" / "config.pbtxt").read_text() == before
    assert not list(tmp_path.glob(".repository*"))


def test_no_templates(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="has no model"):
        repository.render(tmp_path, VALUES)


def test_our_own_templates_render(tmp_path: Path) -> None:
    plan = make_plan(SMALL, CPU)
    folders = tmp_path / "engine", tmp_path / "source"
    values = repository.values_for(plan, "tiny", *folders, 8, baseline_dtype="float32")
    target = tmp_path / "repository"
    repository.write(repository.render(TEMPLATES, values), target)
    models = {path.name for path in target.iterdir()}
    assert models >= {
        "preprocessing",
        "tensorrt_llm",
        "postprocessing",
        "ensemble",
        "text_generation",
        "hf_baseline",
    }
    for config in target.glob("*/config.pbtxt"):
        assert "${" not in config.read_text(encoding="utf-8")
    baseline = (target / "hf_baseline" / "config.pbtxt").read_text(encoding="utf-8")
    assert "max_batch_size: 8" in baseline and '"dtype" value: { string_value: "float32" }' in baseline


@pytest.mark.parametrize(("cores", "instances"), [(2, 1), (16, 2)])
def test_many_cores_tokenise_with_two_processes(tmp_path: Path, cores: int, instances: int) -> None:
    values = repository.values_for(make_plan(SMALL, CPU), "tiny", tmp_path, tmp_path, cores=cores)
    files = repository.render(TEMPLATES, values)
    group = "instance_group [ {{ count: {} kind: KIND_CPU }} ]"
    assert group.format(instances) in files["preprocessing/config.pbtxt"].decode()
    assert group.format(1) in files["postprocessing/config.pbtxt"].decode(), "streams keep their order"
    assert group.format(instances) in files["text_generation/config.pbtxt"].decode()
    assert group.format(1) in files["tensorrt_llm/config.pbtxt"].decode()


def test_an_instance_for_each_engine(tmp_path: Path) -> None:
    values = repository.values_for(make_plan(SMALL, PAIR, dp=2), "tiny", tmp_path, tmp_path)
    files = repository.render(TEMPLATES, values)
    for model, count in (("tensorrt_llm", 2), ("text_generation", 2), ("hf_baseline", 1)):
        group = f"instance_group [ {{ count: {count} kind: KIND_CPU }} ]"
        assert group in files[f"{model}/config.pbtxt"].decode(), model
