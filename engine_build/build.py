"""The stages in their order. Torch is imported only by a stage that has work to do."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flightline import deployment
from flightline.deployment import Deployment
from flightline.engine_build import record, repository
from flightline.engine_build.cache import FileHashes, digest, source_version
from flightline.engine_build.checkpoint import Checkpoint, obtain
from flightline.engine_build.errors import GateRefused, PrecisionRefused
from flightline.engine_build.hardware import Hardware, detect
from flightline.engine_build.package import package, package_llm_api
from flightline.engine_build.plan import (
    AUTO,
    INTEGERS,
    Plan,
    make_plan,
    other_kv_dtypes,
    require_tensorrt_llm,
)
from flightline.engine_build.prompts import read_prompts
from flightline.engine_build.settings import Settings
from flightline.engine_build.trtllm.parameters import check
from flightline.engine_build.workspace import locked, new_folder, write_text
from flightline.torch_engine.kernels.cpu.toolchain import SOURCES

DATA = Path(__file__).parent / "data"
CALIBRATION, GATE_TEXT, GATE_PROMPTS = (
    DATA / "calibration.jsonl",
    DATA / "gate.txt",
    DATA / "gate_prompts.jsonl",
)
TEMPLATES = Path(__file__).parent.parent / "model_repository"
ENGINE = Path(__file__).parent.parent / "torch_engine"
ENGINE_SOURCES = [
    *sorted((ENGINE / "model").glob("*.py")),
    *sorted((ENGINE / "kernels").glob("**/*.py")),
    *sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp")),
]
"""What decides an engine's logits, which the gate has judged."""
CPU_STRIDE = 3
"""On a CPU every third of our calibration prompts is taken: minutes less, and no worse by the gate."""
DRY_RUN_GPU = Hardware("cuda", "NVIDIA H200", 141 << 30, 139 << 30, capability=(9, 0))
Say = Callable[[str], None]


class Note:
    """One stage's line, filled in while the stage runs."""

    text = ""
    cached = False


class Build:
    """One run of the pipeline; ``seconds`` of each stage go into the manifest."""

    def __init__(self, settings: Settings, say: Say = print) -> None:
        self.settings = settings
        self.say = say
        self.seconds: dict[str, float] = {}
        self.root = settings.build_dir
        self._references: dict[Path, Any] = {}
        """What each source said to the accuracy gate: asked once, however many candidates it judges."""

    def run(self) -> dict[str, Any]:
        """Builds what is not built yet and returns the content of ``deployment.json`` (nothing of a dry run).

        Raises:
            BuildError: it cannot be built; nothing half-written is left.
        """
        with locked(self.root):
            self.hashes = FileHashes(self.root)
            try:
                return self._stages()
            finally:
                self.hashes.save()

    def _stages(self) -> dict[str, Any]:
        with self._stage("checkpoint") as note:
            keep_codes = self.settings.precision in (AUTO, "int4")
            source = obtain(self.settings.model, self.root, self.hashes, self.settings.force, keep_codes)
            note.cached = source.cached
            note.text = f"{source.name}, {source.shape.parameters / 1e6:.0f}M parameters"
        hardware = self._hardware()
        plan = self._plan(source, hardware)
        if self.settings.dry_run:
            return self._dry_run(source, plan)
        require_tensorrt_llm(plan, hardware.tensorrt_llm)
        logits_type = "TYPE_FP32"
        if plan.lane == "trtllm-engine":
            source_dir = model_dir = source.folder
            engine_dir, logits_type = self._trtllm_engine(source, plan, hardware)
        else:
            plan, source_dir, model_dir, engine_dir = self._engine(source, hardware, plan)
        with self._stage("repository") as note:
            values = repository.values_for(
                plan,
                source.name,
                engine_dir,
                source_dir,
                self.settings.baseline_max_batch_size,
                baseline_dtype=self.settings.baseline_dtype,
                parameters=self.settings.parameters,
                logits_type=logits_type,
                cores=hardware.cores,
                decoupled=self.settings.decoupled,
                accumulate_tokens=self.settings.accumulate_tokens,
                contract=self.settings.contract,
            )
            rendering = repository.render(TEMPLATES, values, self.settings.contract)
            note.cached = not repository.write(rendering, self.root / "model_repository")
            note.text = ", ".join(sorted({name.split("/")[0] for name in rendering}))
        return self._deployment(source.name, plan, hardware, engine_dir, model_dir, source_dir)

    def _hardware(self) -> Hardware:
        """This machine, or for a dry run of TensorRT-LLM without a GPU the one that NVIDIA's examples have."""
        here = detect()
        if (
            not self.settings.dry_run
            or here.device == "cuda"
            or not self.settings.engine.startswith("trtllm")
        ):
            return here
        wanted = self.settings.tp * self.settings.pp
        note = f"no GPU here: shown for {wanted} x {DRY_RUN_GPU.name}"
        return dataclasses.replace(DRY_RUN_GPU, count=wanted, note=note)

    @contextmanager
    def _stage(self, name: str) -> Iterator[Note]:
        note, start = Note(), time.monotonic()
        yield note
        self.seconds[name] = round(time.monotonic() - start, 2)
        state = "unchanged" if note.cached else f"{self.seconds[name]:.1f} s"
        self.say(f"{name:<12}{state:>10}  {note.text}")

    def _plan(self, source: Checkpoint, hardware: Hardware, refused: tuple[str, ...] = ()) -> Plan:
        with self._stage("plan") as note:
            plan = self._make_plan(source, hardware, self.settings.precision, refused)
            note.text = f"backend {plan.lane}, precision {plan.precision} on {hardware.name}"
        for reason in plan.reasons:
            self.say(f"              - {reason}")
        return plan

    def _make_plan(
        self,
        source: Checkpoint,
        hardware: Hardware,
        precision: str,
        refused: tuple[str, ...] = (),
        kv_dtype: str | None = None,
    ) -> Plan:
        asked = self.settings
        return make_plan(
            source.shape,
            hardware,
            asked.engine,
            precision,
            asked.max_seq_len,
            asked.max_batch_size,
            asked.tp,
            asked.pp,
            refused,
            asked.dp,
            asked.max_num_tokens,
            asked.max_gap_ms,
            kv_dtype,
            asked.host_kv_gib,
        )

    def _engine(
        self, source: Checkpoint, hardware: Hardware, plan: Plan, refused: tuple[str, ...] = ()
    ) -> tuple[Plan, Path, Path, Path]:
        """The plan, and the folders of bf16 checkpoint, engine checkpoint and engine.

        Where the user leaves the precision to us, the next one follows one that is refused.
        """
        try:
            source_dir, model_dir, checkpoint_record = self._engine_checkpoint(source, plan)
            plan, engine_dir = self._package(source, source_dir, model_dir, plan, hardware, checkpoint_record)
        except PrecisionRefused as refusal:
            if self.settings.precision != AUTO or plan.precision not in INTEGERS:
                raise
            self.say(f"              - {refusal}")
            refused = (*refused, plan.precision)
            return self._engine(source, hardware, self._plan(source, hardware, refused), refused)
        return plan, source_dir, model_dir, engine_dir

    def _engine_checkpoint(self, source: Checkpoint, plan: Plan) -> tuple[Path, Path, dict[str, Any]]:
        """bf16 folder (for tokenizer and baseline), the folder the engine runs, and the latter's record."""
        if source.shape.fp8 or source.shape.int4:
            folder, built = self._dequantized(source, plan)
            return folder, source.folder, built
        if plan.precision != "fp8":
            return source.folder, source.folder, {"key": None}
        folder, built = self._quantized(source, plan)
        return source.folder, folder, built

    def _quantized(self, source: Checkpoint, plan: Plan) -> tuple[Path, dict[str, Any]]:
        """The FP8 checkpoint. It takes its place only after it has passed the accuracy gate."""
        folder = self.root / "checkpoints" / f"{source.name}-fp8"
        calibration = self.settings.calibration or CALIBRATION
        samples = read_prompts(calibration)
        if plan.device == "cpu" and calibration == CALIBRATION:
            samples = samples[::CPU_STRIDE]
        inputs = self._inputs(source, plan) | self._gate_inputs()
        inputs["calibration"] = self.hashes.of(calibration)
        key = digest(inputs)
        built = self._current(folder, key)
        if built is not None:
            with self._stage("quantize") as note:
                note.cached, note.text = True, f"FP8, {built['calibration']['samples']} calibration samples"
            with self._stage("gate") as note:
                note.cached, note.text = True, built["gate"]["summary"]
            return folder, built
        with new_folder(folder) as fresh:
            with self._stage("quantize") as note:
                from flightline.engine_build.quantize import quantize

                seen = quantize(source.folder, samples, fresh, plan.device, plan.build_dtype)
                note.text = f"FP8, {seen.samples} calibration samples, {seen.tokens} tokens"
            gate = self._gate(source.folder, fresh, plan)
            facts = {"inputs": inputs, "calibration": dataclasses.asdict(seen), "gate": gate}
            built = record.close(fresh, key, facts)
        return folder, built

    def _dequantized(self, source: Checkpoint, plan: Plan) -> tuple[Path, dict[str, Any]]:
        """The bf16 reading of a checkpoint that came quantised: what the baseline and the gate compare with."""
        folder = self.root / "checkpoints" / f"{source.name}-bf16"
        inputs = self._inputs(source, plan) | self._gate_inputs()
        key = digest(inputs)
        built = self._current(folder, key)
        if built is not None:
            if built["gate"]:
                with self._stage("gate") as note:
                    note.cached, note.text = True, built["gate"]["summary"]
            return folder, built
        with new_folder(folder) as fresh:
            with self._stage("dequantize") as note:
                from flightline.engine_build.quantize import dequantize

                dequantize(source.folder, fresh)
                note.text = f"bf16 copy of {source.shape.stored}, for the baseline and the gate"
            # Only FP8 says what becomes of the activations; codes of 4 bits are judged with the engine that reads them.
            gate = self._gate(fresh, source.folder, plan) if source.shape.fp8 else None
            built = record.close(fresh, key, {"inputs": inputs, "gate": gate})
        return folder, built

    def _gate(self, source: Path, quantized: Path, plan: Plan) -> dict[str, Any]:
        from flightline.engine_build import gate, source_model

        def become(model: Any) -> Any:
            if model is None:  # the source has said its part before
                model, _ = source_model.load(source, plan.device, plan.build_dtype)
            return gate.become_w8a8(model, quantized)

        return self._judged(source, plan, become)

    def _engine_gate(self, source: Path, plan: Plan, engine_dir: Path) -> dict[str, Any]:
        from flightline.engine_build.engine_model import EngineModel
        from flightline.engine_build.gate import MAX_TOKENS

        return {"gate": self._judged(source, plan, lambda _: EngineModel(engine_dir, MAX_TOKENS))}

    def _judged(self, source: Path, plan: Plan, become: Any) -> dict[str, Any]:
        """The gate's record of what ``become`` makes, out of the loaded source if it needs that.

        Raises:
            GateRefused: it is not the same model any more.
            BuildError: the source itself is broken.
        """
        with self._stage("gate") as note:
            from flightline.engine_build import gate, source_model

            model, first = None, source not in self._references
            if first:
                text, prompts = GATE_TEXT.read_text(encoding="utf-8"), read_prompts(GATE_PROMPTS)
                model, tokenizer = source_model.load(source, plan.device, plan.build_dtype)
                self._references[source] = gate.refer(source, model, tokenizer, text, prompts)
            result = gate.judge(self._references[source], become(model))
            note.text = str(result)
        if first and result.remark:
            self.say(f"              - {result.remark}")
        result.require(f"PRECISION={plan.precision}", _remedy(plan))
        return result.record() | {"summary": str(result)}

    def _package(
        self,
        source: Checkpoint,
        source_dir: Path,
        model_dir: Path,
        plan: Plan,
        hardware: Hardware,
        checkpoint: dict[str, Any],
    ) -> tuple[Plan, Path]:
        """The engine folder, and the plan with the KV cache that has passed the gate."""
        folder = self._engine_folder(source, plan)
        inputs = self._inputs(source, plan) | {
            "checkpoint": checkpoint["key"],
            "model_dir": str(model_dir),
            "hardware": hardware.identity(),
            "engine": [self.hashes.of(path) for path in ENGINE_SOURCES],
            "max_seq_len": self.settings.max_seq_len,
            "max_batch_size": self.settings.max_batch_size,
            "max_num_tokens": self.settings.max_num_tokens,
            "max_gap_ms": self.settings.max_gap_ms,
            "host_kv_gib": self.settings.host_kv_gib,
            "tp": plan.tp,
        }
        if plan.lane == "torch":
            inputs |= self._gate_inputs()
        if plan.lane == "trtllm-pytorch":
            inputs |= self._llm_api_settings
        key = digest(inputs)
        built = self._current(folder, key)
        if built is not None and "refused" in built:
            raise GateRefused(built["refused"])
        with self._stage("package") as note:
            note.cached = built is not None
            if built is None:
                facts = {
                    "inputs": inputs,
                    "gate": checkpoint.get("gate"),
                    "calibration": checkpoint.get("calibration"),
                    "checkpoint_files": checkpoint.get("files"),
                }
                try:
                    plan = self._write_engine(source, source_dir, model_dir, plan, hardware, key, facts)
                except GateRefused as refusal:  # remembered, so that it is not measured again every time
                    with new_folder(folder) as fresh:
                        record.close(fresh, key, {"inputs": inputs, "refused": str(refusal)})
                    raise
            elif (kv_dtype := built["plan"]["kv_dtype"]) != plan.kv_dtype:
                plan = self._make_plan(source, hardware, plan.precision, kv_dtype=kv_dtype)
            note.text = _shown(folder)
            if plan.lane == "torch" and plan.kv_dtype != "auto":
                note.text += f", {plan.kv_dtype} KV cache"
        return plan, folder

    @property
    def _llm_api_settings(self) -> dict[str, str]:
        """What the user asks of backend trtllm-pytorch, by the names of ``LlmConfig``."""
        asked = self.settings.parameters
        folder = asked.get("lora_dir", "")
        return {
            "guided_decoding": asked.get("guided_decoding_backend", ""),
            "lora_dir": str(Path(folder).absolute()) if folder else "",
        }

    def _write_engine(
        self,
        source: Checkpoint,
        source_dir: Path,
        model_dir: Path,
        plan: Plan,
        hardware: Hardware,
        key: str,
        facts: dict[str, Any],
    ) -> Plan:
        """Writes the folder with the plan's KV cache, or with a better one if the gate refuses it; returns the plan.

        Raises:
            GateRefused: none passes.
        """
        folder = self._engine_folder(source, plan)
        others = list(other_kv_dtypes(plan))
        while True:
            facts |= self._facts(source, plan, hardware, facts["inputs"])
            try:
                if plan.lane == "torch":
                    check = functools.partial(self._engine_gate, source_dir, plan)
                    remarks = package(folder, model_dir, plan, key, facts, check)
                else:
                    remarks = package_llm_api(folder, model_dir, plan, key, facts, self._llm_api_settings)
            except GateRefused as refusal:
                if not others:
                    raise
                better = others.pop(0)
                self.say(
                    f"              - KV cache {better} instead of {plan.kv_dtype}, with which {refusal.why}"
                )
                plan = self._make_plan(source, hardware, plan.precision, kv_dtype=better)
                continue
            for remark in remarks:
                self.say(f"              - {remark}")
            return plan

    def _engine_folder(self, source: Checkpoint, plan: Plan) -> Path:
        return self.root / "engines" / f"{source.name}-{plan.lane}-{plan.precision}"

    def _trtllm_engine(self, source: Checkpoint, plan: Plan, hardware: Hardware) -> tuple[Path, str]:
        """Calibrates and compiles with TensorRT-LLM's own tools. Returns the folder and its logits dtype."""
        from flightline.engine_build.trtllm import build, engine_folder

        folder, work = self._engine_folder(source, plan), self.root / "work"
        calibration = self.settings.calibration or CALIBRATION
        samples = read_prompts(calibration)
        inputs = self._inputs(source, plan) | {
            "calibration": self.hashes.of(calibration),
            "hardware": hardware.identity(),
            "plan": dataclasses.asdict(dataclasses.replace(plan, reasons=())),
            "build": self._engine_flags(),
        }
        key = digest(inputs)
        with self._stage("engine") as note:
            note.cached = self._current(folder, key) is not None
            if not note.cached:
                build.require_disk(self.root, source.shape, plan)
                tokenizer = self._tokenizer(source.folder)
                with new_folder(folder) as fresh, new_folder(work) as scratch:
                    flags = self._engine_flags()
                    build.run(source.folder, samples, tokenizer, plan, scratch, fresh, **flags)
                    facts = self._facts(source, plan, hardware, inputs)
                    record.close(fresh, key, facts | {"calibration": {"samples": len(samples)}})
                shutil.rmtree(work, ignore_errors=True)
            note.text = f"{_shown(folder)} (TensorRT-LLM {hardware.tensorrt_llm})"
        return folder, engine_folder.logits_type(engine_folder.require_built(folder, plan))

    def _engine_flags(self) -> dict[str, Any]:
        """What the user asks of ``trtllm-build``."""
        width = self.settings.parameters.get("max_beam_width", "1")
        check("max_beam_width", width)
        return {"beam_width": int(width), "more": self.settings.build_flags}

    @staticmethod
    def _tokenizer(folder: Path) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)

    def _dry_run(self, source: Checkpoint, plan: Plan) -> dict[str, Any]:
        """Says what a build would do, in the order in which it would."""
        engine_dir = self._engine_folder(source, plan)
        if plan.lane == "trtllm-engine":
            from flightline.engine_build.trtllm import build

            samples = len(read_prompts(self.settings.calibration or CALIBRATION))
            work, flags = self.root / "work", self._engine_flags()
            lines = build.dry_run(source.folder, samples, plan, work, engine_dir, **flags)
        else:
            lines = []
            if plan.precision == "fp8" and not source.shape.fp8:
                lines += [f"write  {self.root}/checkpoints/{source.name}-fp8/ (ModelOpt FP8, accuracy gate)"]
            name = "engine.json" if plan.lane == "torch" else "llm_api.json"
            lines += [f"write  {engine_dir}/{file}" for file in (name, "manifest.json")]
        values = repository.values_for(
            plan,
            source.name,
            engine_dir,
            source.folder,
            parameters=self.settings.parameters,
            decoupled=self.settings.decoupled,
            accumulate_tokens=self.settings.accumulate_tokens,
            contract=self.settings.contract,
        )
        rendering = repository.render(TEMPLATES, values, self.settings.contract)
        lines += [f"write  {self.root}/model_repository/{name}" for name in sorted(rendering)]
        for line in [*lines, f"write  {self.root}/{deployment.FILE}", "dry run: no engine was built"]:
            self.say(line)
        return {}

    def _facts(
        self, source: Checkpoint, plan: Plan, hardware: Hardware, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """What every engine's manifest says; the server checks the part about TensorRT-LLM and the GPU."""
        return {
            "model": source.name,
            "inputs": inputs,
            "plan": dataclasses.asdict(plan),
            "versions": record.tool_versions(),
            "hardware": dataclasses.asdict(hardware),
            "seconds": self.seconds,
            "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _inputs(self, source: Checkpoint, plan: Plan) -> dict[str, Any]:
        """What every built thing depends on."""
        return {
            "source": source.content,
            "code": source_version(self.hashes),
            "versions": record.tool_versions(),
            "lane": plan.lane,
            "precision": plan.precision,
            "build_dtype": plan.build_dtype,
            "device": plan.device,
        }

    def _gate_inputs(self) -> dict[str, Any]:
        return {"gate_text": self.hashes.of(GATE_TEXT), "gate_prompts": self.hashes.of(GATE_PROMPTS)}

    def _current(self, folder: Path, key: str) -> dict[str, Any] | None:
        return None if self.settings.force else record.current(folder, key)

    def _deployment(
        self, name: str, plan: Plan, hardware: Hardware, engine_dir: Path, model_dir: Path, source_dir: Path
    ) -> dict[str, Any]:
        """Written last: it exists only for a build that is whole."""
        text = Deployment(
            model=name,
            lane=plan.lane,
            precision=plan.precision,
            world_size=plan.world_size,
            dp=plan.dp,
            engine_dir=engine_dir,
            model_dir=model_dir,
            source_dir=source_dir,
            model_repository=self.root / "model_repository",
            manifest=engine_dir / record.MANIFEST,
            baseline={
                "dtype": self.settings.baseline_dtype,
                "max_batch_size": self.settings.baseline_max_batch_size,
            },
            hardware=hardware.identity(),
        ).text()
        write_text(self.root / deployment.FILE, text)
        return json.loads(text)


def _remedy(plan: Plan) -> str:
    """What to do about a plan that the gate refuses."""
    if plan.precision == "bf16":
        return (
            "the engine computes another model than Transformers does: please report it with the config.json"
        )
    if plan.precision == "fp8":
        return (
            "use PRECISION=bf16, or calibrate with more prompts like your own traffic (CALIB=prompts.jsonl)"
        )
    if plan.device == "cpu":
        other = next(name for name in INTEGERS if name != plan.precision)
        return f"use PRECISION={other} or PRECISION=bf16"
    return "use PRECISION=bf16"


def _shown(path: Path) -> str:
    """A path as the user would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
