"""Walk a curriculum: skip what is finished, continue what is not, leave a folder that explains itself.

A stage is finished when its folder holds ``done.json`` under the hash of the stage, its ancestors, their sources and
the first model; ``done.json`` is written last and atomically, so a killed run never looks finished. Changing one stage
redoes that stage and those that start from it, nothing else; folders of another version of the curriculum move to
``old/`` and come back when the curriculum does. The report (section 3) runs each stage by hand from the last one's
weights; here the order is data.

Under ``torchrun`` all processes walk the same curriculum in the same folder. The main one alone holds the lock, names
folders, averages, asks the probe and writes ``done.json`` and the report; the others wait for what it found, and all
train together. An error in any of them ends the run: its launcher ends the rest.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sailvl.config import ConfigError, digest, to_dict
from sailvl.curriculum import (
    Checkpoint,
    Curriculum,
    Fresh,
    Probe,
    Soup,
    Synth,
    Train,
    check,
    sources_of,
    stage_hash,
)
from sailvl.doctor import surroundings
from sailvl.files import writing
from sailvl.lock import lock

if TYPE_CHECKING:
    from rich.progress import Progress

    from sailvl.data.source import Source
    from sailvl.model.modeling import SailVLForConditionalGeneration
    from sailvl.model.processing import SailVLProcessor


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """How one stage ended: its folder, whether it was already finished, and the contents of its ``done.json``."""

    name: str
    folder: Path
    skipped: bool
    done: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The stage's model folder."""
        return self.folder / "model"


def run(
    curriculum: Curriculum,
    out: Path,
    *,
    workers: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[StageReport]:
    """Run every unfinished stage of ``curriculum`` in ``out`` and write ``out/report.html`` after each.

    ``workers`` are loader processes (the data order does not depend on them); ``say`` gets one line per event.
    A stage that is finished but was asked other probe questions is asked again, not trained again.
    Raises ConfigError for a faulty curriculum or missing files, LockedError when another process holds the folder.
    KeyboardInterrupt passes through after the running stage has saved itself.
    Of several processes, which a launcher or the caller has brought together, all must call it.
    """
    from sailvl import dist

    faults = check(curriculum) or _missing_extras(curriculum)
    if faults:
        raise ConfigError(faults, curriculum.name)
    with dist.processes():
        faults = _unshareable(curriculum, dist.world_size())
        if faults:
            raise ConfigError(faults, curriculum.name)
        if not dist.is_main():
            dist.barrier()  # the main process first: what it indexes, the others find
            say, progress = _say_nothing, None
        sources = open_sources(curriculum, cache=out / "index")
        if dist.is_main():
            dist.barrier()
        with lock(out) if dist.is_main() else nullcontext():
            return _walk(curriculum, sources, out, workers=workers, progress=progress, say=say)


def _say_nothing(line: str) -> None:
    pass


def _walk(
    curriculum: Curriculum,
    sources: Mapping[str, Source],
    out: Path,
    *,
    workers: int,
    progress: Progress | None,
    say: Callable[[str], None],
) -> list[StageReport]:
    from sailvl.dist import on_main

    def begin() -> tuple[dict[str, str], dict[str, Path]]:
        prints = fingerprints(curriculum, sources)
        write_json(out / "curriculum.json", to_dict(curriculum))
        return prints, settle(curriculum, out, prints)

    prints, folders = on_main(begin)
    reports: list[StageReport] = []
    for index, stage in enumerate(curriculum.stages):
        label = f"[{index + 1}/{len(curriculum.stages)}] {stage.name}"
        folder = folders[stage.name]
        done, is_asked = on_main(functools.partial(_state_of, curriculum, folder))
        if done is not None and is_asked:
            say(f"{label}: finished before, kept")
            reports.append(StageReport(name=stage.name, folder=folder, skipped=True, done=done))
            continue
        started = time.monotonic()
        if done is None:
            say(f"{label}: {_describe(stage)}")
            trained = _run_stage(curriculum, stage, folders, sources, workers=workers, progress=progress)
            done = {"stage": stage.name, "kind": stage.kind, "hash": stage_hash(curriculum, stage.name, prints)}
            # A resumed stage's own clock knows the time before the interruption.
            seconds = max(time.monotonic() - started, trained.pop("seconds", 0.0))
            done |= trained | {"seconds": round(seconds, 3)} | surroundings()
        if curriculum.probe is not None:
            say(f"{label}: asking {curriculum.probe.samples * len(curriculum.probe.families)} questions")
        done = on_main(functools.partial(_finish, curriculum, stage, out, folder, done, progress))
        reports.append(StageReport(name=stage.name, folder=folder, skipped=False, done=done))
        say(f"{label}: done in {time.monotonic() - started:.0f} s{_results(done)}")
    if all(report.skipped for report in reports):
        on_main(functools.partial(_write_report, out))
    return reports


def _state_of(curriculum: Curriculum, folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """A stage's ``done.json`` if it is finished, and whether it was asked the probe's questions."""
    return read_done(folder), is_probed(curriculum.probe, folder)


def _finish(
    curriculum: Curriculum,
    stage: Train | Soup,
    out: Path,
    folder: Path,
    done: dict[str, Any],
    progress: Progress | None,
) -> dict[str, Any]:
    """Ask a trained stage, and write that it is done; gives what ``done.json`` holds then."""
    if curriculum.probe is not None:
        done |= ask_probe(curriculum.probe, folder, progress)
    write_json(folder / "done.json", done)
    if isinstance(stage, Soup) or not stage.keep_best:  # else they are kept to choose from
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only an unfinished stage is resumed
    if progress:
        for task in progress.task_ids:
            progress.remove_task(task)
    _write_report(out)
    return done


def _unshareable(curriculum: Curriculum, world_size: int) -> list[tuple[str, str]]:
    """Faults of stages that so many processes cannot share."""
    if world_size == 1:
        return []
    from sailvl.train.plan import unshareable

    stages = [(index, stage) for index, stage in enumerate(curriculum.stages) if isinstance(stage, Train)]
    return [
        (f"stages.{index}.{path}", text) for index, stage in stages for path, text in unshareable(stage, world_size)
    ]


def _missing_extras(curriculum: Curriculum) -> list[tuple[str, str]]:
    """Faults for what stages need and is not installed, found before the hours of the stages before them."""
    text = "adapters need peft: pip install 'sailvl[lora]'"
    adapted = [i for i, stage in enumerate(curriculum.stages) if isinstance(stage, Train) and stage.lora]
    return [(f"stages.{i}.lora", text) for i in adapted if importlib.util.find_spec("peft") is None]


def _describe(stage: Train | Soup) -> str:
    if isinstance(stage, Soup):
        return f"average of {', '.join(stage.of)}"
    by = f" by adapters of rank {stage.lora.rank}" if stage.lora else ""
    return f"{stage.steps} steps, trains {', '.join(stage.trains)}{by}"


def _results(done: Mapping[str, Any]) -> str:
    parts = [f", loss {done['loss']:.3f}"] if done.get("loss") is not None else []
    parts += [f", score {done['score']:.1%} (chance is 0%)"] if done.get("score") is not None else []
    return "".join(parts)


def _write_report(out: Path) -> None:
    from sailvl.eval import report

    report.write(out, out / "report.html")


# ---- one stage ------------------------------------------------------------------------------------------------


def _run_stage(
    curriculum: Curriculum,
    stage: Train | Soup,
    folders: Mapping[str, Path],
    sources: Mapping[str, Source],
    *,
    workers: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Leave the stage's ``model`` folder; give what ``done.json`` says about the work."""
    folder = folders[stage.name]
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(stage, Soup):
        from sailvl.dist import on_main
        from sailvl.train.soup import soup

        on_main(lambda: soup([folders[name] / "model" for name in stage.of], folder / "model"))
        return {}
    from sailvl.train.loop import train

    model, processor = first_model(curriculum, stage, folders)
    needed = {name: sources[name] for name in sources_of(stage)}
    result = train(stage, model, processor, needed, folder, workers=workers, progress=progress)
    found = {"steps": result.steps, "loss": result.loss, "precision": result.precision, **vars(result.totals)}
    return found


def first_model(
    curriculum: Curriculum, stage: Train, folders: Mapping[str, Path]
) -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    """Give the model a stage starts from: an earlier stage's, a given checkpoint, or fresh weights.

    Of several processes each has all of it on its CPU: sharding moves a block at a time to the GPU.
    """
    from sailvl.dist import world_size

    is_alone = world_size() == 1
    if stage.init is not None:
        return load_model(folders[stage.init] / "model", placed=is_alone)
    if isinstance(curriculum.model, Checkpoint):
        return load_model(Path(curriculum.model.path), placed=is_alone)
    return fresh_model(curriculum.model, placed=is_alone)


def load_model(
    path: Path, *, int8: bool = False, adapter: Path | None = None, placed: bool = True
) -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    """Load a model folder and its processor, ``placed`` on the GPU if there is one.

    ``int8``: on the CPU, the language model's weights in int8 and the rest in bf16, for answering. ``adapter``: a LoRA
    folder, merged in. ConfigError when the folder is not there, the model cannot be quantised, or the adapter does not
    fit.
    """
    from sailvl.model import checkpoint
    from sailvl.model.processing import SailVLProcessor

    if not (path / "config.json").is_file():
        raise ConfigError([(str(path), "no model folder here (it would hold a config.json)")])
    model = checkpoint.load(path, dtype="bfloat16" if int8 else None)
    if adapter is not None:
        from sailvl.model.convert import ConvertError, merge_adapter

        try:
            merge_adapter(model, adapter)
        except ConvertError as error:  # it names the folders itself
            raise ConfigError([("", str(error))]) from error
    if not int8:
        return _placed(model) if placed else model, SailVLProcessor.from_pretrained(path)
    from sailvl.model.quant import quantize

    try:
        model = quantize(model)
    except ValueError as error:
        raise ConfigError([(str(path), str(error))]) from error
    return model, SailVLProcessor.from_pretrained(path)


def fresh_model(given: Fresh, *, placed: bool = True) -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    """Build a model of new weights and its processor, ``placed`` on the GPU if there is one."""
    from sailvl import assets
    from sailvl.model import checkpoint
    from sailvl.model.processing import build_processor

    tiling = checkpoint.scheme_for(given.size, side=given.side, max_tiles=given.max_tiles)
    tokenizer = Path(given.tokenizer) if given.tokenizer else assets.tokenizer_path()
    processor = build_processor(tokenizer, tiling=tiling, system_message="")
    config = checkpoint.config_for(given.size, processor=processor)
    model = checkpoint.build(config, seed=given.seed)
    return _placed(model) if placed else model, processor


def _placed(model: Any) -> Any:
    from sailvl.dist import device

    return model.to(device())


# ---- the probe --------------------------------------------------------------------------------------------------


def is_probed(probe: Probe | None, folder: Path) -> bool:
    """Whether a stage has been asked these very probe questions (or there are none to ask)."""
    return probe is None or ((folder / "eval/scores.json").is_file() and _asked(folder) == _probe_id(probe))


def ask_probe(probe: Probe, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Ask a stage's finished model the probe's questions; answers and scores go to ``folder/eval``.

    Answers to other questions are deleted first. Gives the mean score above chance and its interval.
    """
    from sailvl.curate.synth import questions
    from sailvl.curate.synth.source import question_images
    from sailvl.engine.local import Local
    from sailvl.eval.evaluate import evaluate

    if _asked(folder) != _probe_id(probe):
        shutil.rmtree(folder / "eval", ignore_errors=True)
        write_json(folder / "eval/probe.json", {"id": _probe_id(probe), **to_dict(probe)})
    asked = questions(
        families=probe.families, per_family=probe.samples, split=probe.split, seed=probe.seed, side=probe.side
    )
    engine = Local(*load_model(folder / "model"))
    scores = evaluate(
        engine, asked, question_images, folder / "eval", max_new_tokens=probe.max_new_tokens, progress=progress
    )
    head = scores.headline
    return {
        "score": head.mean,
        "score_low": head.low,
        "score_high": head.high,
        "probe_seconds": round(scores.seconds, 3),
    }


def _asked(folder: Path) -> str | None:
    content = _read_json(folder / "eval/probe.json")
    return str(content["id"]) if content and "id" in content else None


def _probe_id(probe: Probe) -> str:
    return digest([to_dict(probe), corpus_fingerprint(probe.split)])


# ---- sources ----------------------------------------------------------------------------------------------------


def open_sources(curriculum: Curriculum, *, cache: Path | None = None) -> dict[str, Source]:
    """Open every source that a stage uses; ``cache`` is a folder for indexes that take long to make.

    Raises ConfigError that lists all the files that are missing.
    """
    used = {name for stage in curriculum.stages if isinstance(stage, Train) for name in sources_of(stage)}
    errors = []
    opened: dict[str, Source] = {}
    for name in sorted(used):
        value = curriculum.sources[name]
        try:
            opened[name] = OPEN[value.kind](name, value, cache)
        except (OSError, ValueError) as error:
            errors.append((f"sources.{name}", str(error)))
    if errors:
        raise ConfigError(errors)
    return opened


def _open_jsonl(name: str, value: Any, cache: Path | None) -> Source:
    from sailvl.data.source import JsonlSource

    root = Path(value.image_root) if value.image_root else None
    return JsonlSource(Path(value.path), name=name, image_root=root, num_frames=value.num_frames)


def _open_parquet(name: str, value: Any, cache: Path | None) -> Source:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("Parquet files need pyarrow: pip install 'sailvl[parquet]'")
    from sailvl.data.parquet import ParquetSource

    return ParquetSource(value.path, name=name, image_root=value.image_root, num_frames=value.num_frames)


def _open_webdataset(name: str, value: Any, cache: Path | None) -> Source:
    from sailvl.data.webdataset import WebDatasetSource

    return WebDatasetSource(value.path, name=name, prompt=value.prompt, num_frames=value.num_frames, cache=cache)


def _open_synth(name: str, value: Any, cache: Path | None) -> Source:
    from sailvl.curate.synth import SynthSource

    return SynthSource(
        name,
        families=value.families,
        split=value.split,
        size=value.size,
        seed=value.seed,
        side=value.side,
        max_turns=value.max_turns,
        thinking=value.thinking,
    )


OPEN: dict[str, Callable[[str, Any, Path | None], Source]] = {
    "jsonl": _open_jsonl, "parquet": _open_parquet, "webdataset": _open_webdataset, "synth": _open_synth,
}  # fmt: skip


def fingerprints(curriculum: Curriculum, sources: Mapping[str, Source]) -> dict[str, str]:
    """Say for every opened source what its content is, so that changed data under an old name is noticed."""
    found = {}
    for name, source in sources.items():
        value = curriculum.sources[name]
        drawn_from = corpus_fingerprint(value.split) if isinstance(value, Synth) else ""
        found[name] = digest([source.fingerprint(), drawn_from])
    return found


@functools.cache
def corpus_fingerprint(split: Literal["train", "validation", "test"]) -> str:
    """Hash what one split of the packaged corpus holds: drawn pictures are made of it."""
    from sailvl import assets

    return digest([[[item.id, item.sha256] for item in assets.items(split)], assets.tables(split)])


# ---- the run folder -----------------------------------------------------------------------------------------------


def settle(curriculum: Curriculum, out: Path, prints: Mapping[str, str]) -> dict[str, Path]:
    """Name every stage's folder; other versions' folders move to ``old/``, and this version's come back from there."""
    stages, old = out / "stages", out / "old"
    stages.mkdir(parents=True, exist_ok=True)
    suffixes = {
        stage.name: f"-{stage.name}-{stage_hash(curriculum, stage.name, prints)[:8]}" for stage in curriculum.stages
    }
    kept = {}
    for index, (name, suffix) in enumerate(suffixes.items()):
        wanted = stages / f"{index + 1:02d}{suffix}"
        found = [path for place in (stages, old) for path in sorted(place.glob(f"[0-9][0-9]{suffix}"))]
        if found and not wanted.exists():
            found[0].rename(wanted)
        kept[name] = wanted
    for path in sorted(stages.iterdir()):
        if path not in kept.values():
            old.mkdir(exist_ok=True)
            path.rename(_free(old / path.name))
    return kept


def _free(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('~')[0]}~{number}")
    return path


def read_done(folder: Path) -> dict[str, Any] | None:
    """Give a finished stage's ``done.json``; None while it is not finished (or its model was deleted)."""
    return _read_json(folder / "done.json") if (folder / "model").is_dir() else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finished_models(out: Path) -> list[Path]:
    """Model folders of a run's finished stages, newest first."""
    done = [path for path in (out / "stages").glob("*/done.json") if read_done(path.parent) is not None]
    return [path.parent / "model" for path in sorted(done, key=lambda path: path.stat().st_mtime, reverse=True)]


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either complete or not there (temporary file, fsync, rename)."""
    with writing(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
