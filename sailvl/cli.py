"""The ``sailvl`` command. A verb reads its arguments, calls one function of the package, and says what came out.

Exit codes: 0 it worked, 1 it failed, 2 the input is wrong (arguments, recipe, files), 130 interrupted.
Wrong input is answered by one line per fault, never by a traceback; ``--debug`` shows the traceback of any failure.
Everything heavy is imported inside the verbs, so that help and plans appear at once.
"""

from __future__ import annotations

import functools
import json as json_module
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.progress import Progress

    from sailvl.curriculum import Curriculum
    from sailvl.engine.base import Engine, Request
    from sailvl.run import StageReport
    from sailvl.types import Completion

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (nano) or a YAML/JSON file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as stages.pretrain.lr=1e-4."),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that prepare data; the data order is the same for any.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads for the model; 0 leaves the choice to PyTorch.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else.")]


UsageError: Any = typer.BadParameter.__mro__[1]
"""Click's base class of wrong arguments, wherever typer keeps it: typer brought its own copy of click in 0.2x."""


class InputError(ValueError):
    """Arguments that cannot be used; one line per fault."""


@app.callback()
def sailvl(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure (accepted anywhere).")
    ] = False,
) -> None:
    """The open, complete, runnable SAIL-VL2: train it, ask it, from a laptop up.

    \b
    sailvl doctor                            is everything here?
    sailvl run nano                          the whole curriculum, on a CPU
    sailvl ask picture.png "What is this?"   ask the model it made

    \b
    Exit codes: 0 it worked, 1 it failed, 2 wrong input, 130 interrupted.
    """


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    workers: Workers = 0,
    threads: Threads = 0,
    shrink: Annotated[float, typer.Option(min=1, help="Divide all steps by this: a first look at the same graph.")] = 1,
    json: Json = False,
) -> None:
    """Run a curriculum: every stage that is not finished yet, then the report.

    Run it again to continue after an interruption; after a change only the changed stages and those that start from
    them are run.

    \b
    sailvl run nano
    sailvl run nano --shrink 10 --out runs/look
    sailvl run recipe.yaml stages.multitask.steps=500 --workers 2
    """
    curriculum = _read_recipe(recipe, overrides or [], shrink)
    _run(curriculum, out or Path("runs") / curriculum.name, workers, threads, json)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.YAML", help="A training recipe with your own data.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    workers: Workers = 0,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Train on your own data: one stage written flat, or a whole curriculum.

    A flat recipe has a model, sources, and the fields of one training stage. Paths in it are relative to the file.

    \b
    name: captions
    model: {kind: checkpoint, path: runs/nano/stages/12-longcot-0a1b2c3d/model}
    sources:
      mine: {kind: jsonl, path: captions.jsonl}
    trains: [projector, lm]
    steps: 200
    max_tokens: 2048
    max_tiles: 32
    lr: 1e-4

    \b
    Each line of captions.jsonl:
    {"images": ["cat.png"], "messages": [{"role": "user", "content": "What is this?"},
                                         {"role": "assistant", "content": "A cat."}]}

    \b
    To train small adapters (LoRA) of these parts instead of their weights, add a line; the stage then leaves the
    folder adapter/ beside model/, which has them merged in:
    lora: {rank: 16, alpha: 32}

    \b
    sailvl train captions.yaml
    sailvl train captions.yaml lr=5e-5 steps=400 --out runs/slow
    """
    if not recipe.is_file():
        raise InputError(f"{recipe}: no such file")
    curriculum = _read_recipe(str(recipe), overrides or [])
    _run(curriculum, out or Path("runs") / curriculum.name, workers, threads, json)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    shrink: Annotated[float, typer.Option(min=1, help="Divide all steps by this.")] = 1,
    json: Json = False,
) -> None:
    """Print a curriculum's stages, and every fault of its graph, without computing anything.

    \b
    sailvl plan nano
    sailvl plan recipe.yaml stages.multitask.steps=500
    """
    from dataclasses import asdict

    from sailvl.curriculum import plan as plan_rows

    rows = [asdict(row) for row in plan_rows(_read_recipe(recipe, overrides or [], shrink))]
    if json:
        _print_json({"stages": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "starts from", "trains"):
        table.add_column(title, overflow="fold")
    for title in ("steps", "tokens up to", "lr"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("schedule", "data"):
        table.add_column(title, overflow="fold")
    for row in rows:
        steps, tokens = (f"{row[key]:,}" if row[key] else "" for key in ("steps", "max_tokens"))
        lr = f"{row['lr']:g}" if row["lr"] is not None else ""
        table.add_row(row["name"], row["init"], row["trains"], steps, tokens, lr, row["schedule"], row["data"])
    table.add_section()
    table.add_row("total", "", "", f"{sum(r['steps'] for r in rows):,}", f"{sum(r['max_tokens'] for r in rows):,}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def ask(
    words: Annotated[
        list[str], typer.Argument(metavar="[FILE]... QUESTION", help="Pictures and videos, then the question.")
    ],
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or a run's folder; default the newest model of runs/nano.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="LoRA folder to use; --model defaults to what it was trained on.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    num_frames: Annotated[int, typer.Option(min=1, max=1024, help="Frames taken of each video.")] = 16,
    max_tiles: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Most tiles of a picture, its thumbnail aside; default the model's."),
    ] = None,
    msac: Annotated[bool, typer.Option("--msac", help="Cut a single picture by a second grid too.")] = False,
    upscale: Annotated[float, typer.Option(min=1, max=4, help="Enlarge the first picture by this before cutting.")] = 1,
    boxes: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the answer's boxes on the first picture, and save it.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option(metavar="int8", help="int8: half the weights' memory, faster answers on a CPU.")
    ] = None,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Ask a model a question about pictures and videos, or about none. A terminal shows the answer as it comes.

    \b
    sailvl ask photo.jpg "What is this?"
    sailvl ask a.png b.png "Which shows more things?"
    sailvl ask clip.mp4 "What happens?" --num-frames 8
    sailvl ask photo.jpg "Where is the cat?" --boxes found.png
    sailvl ask scan.png "What is the total?" --max-tiles 24
    sailvl ask "一加一等于几?" --model runs/nano
    sailvl ask photo.jpg "What is this?" --adapter runs/mine/stages/01-mine-0a1b2c3d/adapter
    """
    import time

    from sailvl.geometry import ImagePolicy
    from sailvl.media import MediaError
    from sailvl.types import Message, Picture, Record

    if quant not in (None, "int8"):
        raise InputError(f"--quant is '{quant}'; it can be int8")
    *paths, question = words
    if not question.strip():
        raise InputError("the question is empty")
    if Path(question).is_file():
        raise InputError(f'{question} is a file: the question comes last, as in sailvl ask {question} "What is this?"')
    pictures, images, faults = [], [], []
    for path in paths:
        try:
            shown = _decoded(path, num_frames)
        except (MediaError, OSError, ImportError) as error:
            faults.append(str(error) if path in str(error) else f"{path}: {error}")
            continue
        images += [image for image, _ in shown]
        pictures += [Picture(width=i.width, height=i.height, ref=path, frame=frame) for i, frame in shown]
    if boxes is not None:
        faults += _box_faults(boxes, paths)
    if faults:
        raise InputError("\n".join(faults))
    folder = _find_model(model) if adapter is None or model is not None else _base(adapter)
    record = Record(id="question", messages=(Message(role="user", text=question),), pictures=tuple(pictures))
    _settle_libraries(threads)
    from sailvl.engine.base import Request, Sampling
    from sailvl.engine.local import Local
    from sailvl.run import load_model

    engine = Local(*load_model(folder, int8=quant == "int8", adapter=adapter), capacity=1)
    policy = ImagePolicy(max_tiles=max_tiles, msac=msac, upscale=upscale)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    request = Request(id="question", record=record, images=images, sampling=sampling, policy=policy)
    started = time.perf_counter()
    reply = _answer(engine, request, aloud=not json and sys.stdout.isatty())
    seconds = round(time.perf_counter() - started, 3)
    if not json:
        typer.echo("" if sys.stdout.isatty() else reply.text)  # a terminal has read it already
    found = {"answer": reply.text, "finish_reason": reply.finish_reason, "tokens": len(reply.ids)}
    if boxes is not None:
        found["boxes"] = _draw(reply.text, images[0], boxes, quiet=json)
    if json:
        _print_json({"model": str(folder), "question": question, "images": paths, **found, "seconds": seconds})


@app.command()
def soup(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Model folders of one family.")],
    out: Annotated[Path, typer.Option(help="Folder for the average; must not exist yet.")],
    json: Json = False,
) -> None:
    """Average models that branched from one trained model.

    \b
    sailvl soup runs/a/stages/01-sft-*/model runs/b/stages/01-sft-*/model --out runs/soup
    """
    faults = [f"{path}: no model folder (it would hold a config.json)" for path in models if not _is_model(path)]
    if len(models) < 2:
        faults.append("an average needs at least two models")
    if out.exists():
        faults.append(f"{out} exists; choose a new folder")
    if faults:
        raise InputError("\n".join(faults))
    from sailvl.train.soup import SoupError
    from sailvl.train.soup import soup as average

    try:
        average(models, out)
    except SoupError as error:
        raise InputError(str(error)) from error
    _print_json({"model": str(out), "of": [str(path) for path in models]}) if json else typer.echo(str(out))


@app.command()
def experts(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, or a run's folder; one with experts.")],
    text: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Records of text alone.")],
    multimodal: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Records with pictures.")],
    calibrate: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Even out the load and save the model here; must not exist yet.")
    ] = None,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Say how evenly a sparse model uses its experts on text and on pictures; optionally even it out.

    Entropy is 1 where all experts of a layer are used alike, 0 where one does everything. Calibration adds a bias to
    the choice of experts that raises the entropy on pictures and keeps the load on text close to what it was.

    \b
    sailvl experts runs/moe --text text.jsonl --multimodal pictures.jsonl
    sailvl experts runs/moe --text text.jsonl --multimodal pictures.jsonl --calibrate runs/even

    \b
    Files are as for sailvl train: one conversation a line, with "messages" and, for pictures, "images".
    """
    from dataclasses import asdict

    from sailvl.data.source import JsonlSource

    if calibrate is not None and calibrate.exists():
        raise InputError(f"{calibrate} exists; choose a new folder")
    sources, folder = [JsonlSource(text), JsonlSource(multimodal)], _find_model(model)
    _settle_libraries(threads)
    from sailvl.eval.experts import inputs
    from sailvl.model import balance, checkpoint, moe
    from sailvl.run import load_model

    loaded, processor = load_model(folder)
    if not moe.sparse_layers(loaded):
        raise InputError(f"{folder}: this model has no experts")
    sets = [inputs(loaded, processor, source, pictures=bool(i)) for i, source in enumerate(sources)]
    found: dict[str, Any] = {"model": str(folder)}
    if calibrate is None:
        rows = balance.entropy_report(loaded, *sets)
    else:
        outcome = balance.calibrate(loaded, *sets)
        checkpoint.save(loaded, processor, calibrate)
        rows, found["calibrated"] = outcome.after, str(calibrate)
        found |= {"before": [asdict(row) for row in outcome.before], "text_kl": outcome.text_kl}
    if json:
        _print_json(found | {"layers": [asdict(row) for row in rows]})
        return
    typer.echo("layer  text   pictures   experts never chosen (text, pictures)")
    for row in rows:
        unused = f"{row.text_unused}, {row.multimodal_unused}"
        typer.echo(f"{row.layer:>5}  {row.text:.3f}  {row.multimodal:.3f}      {unused}")
    mean = [sum(getattr(row, key) for row in rows) / len(rows) for key in ("text", "multimodal")]
    typer.echo(f" mean  {mean[0]:.3f}  {mean[1]:.3f}")
    if calibrate is not None:
        before = sum(row.multimodal for row in outcome.before) / len(rows)
        typer.echo(f"pictures had {before:.3f}; the load on text moved by at most {max(outcome.text_kl):.4f} nats")
        typer.echo(str(calibrate))


@app.command()
def convert(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="Model folder, or a run's folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a model folder here; must not exist yet.")] = None,
    vit: Annotated[Path | None, typer.Option(help="Write the vision encoder alone to this folder.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="Write the language model to this GGUF file.")] = None,
    vision: Annotated[Path | None, typer.Option(help="New model: folder of an AIMv2 or SAIL-ViT encoder.")] = None,
    lm: Annotated[Path | None, typer.Option(help="New model: folder of a Qwen3 language model.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA folder to merge into MODEL.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 5GB or 500MB.")] = "5GB",
    gguf_type: Annotated[str | None, typer.Option(help="bf16, f16 or q8_0; default bf16.")] = None,
    side: Annotated[int | None, typer.Option(min=28, help="New model: tile side in pixels; default 448.")] = None,
    anyres: Annotated[bool, typer.Option("--anyres", help="New model: see pictures at any resolution.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="New model: seed of the projector; default 0.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="For the model card; default the source's.")] = None,
    json: Json = False,
) -> None:
    """Make a model folder out of others, proved by reading it back before it appears.

    MODEL is written in the released layout, in another precision, with an adapter merged in, without its language
    model (--vit) or without its eyes (--gguf, for llama.cpp). An encoder and a language model (--vision, --lm) become a
    new model with a fresh projector, ready for training.

    \b
    sailvl convert runs/nano --out nano-hub
    sailvl convert SAIL-VL2-2B --out 2b-fp32 --dtype fp32 --max-shard-size 2GB
    sailvl convert SAIL-VL2-2B --adapter my-lora --out 2b-mine
    sailvl convert SAIL-VL2-2B --vit sail-vit
    sailvl convert SAIL-VL2-2B --gguf 2b.gguf --gguf-type q8_0
    sailvl convert --vision aimv2-huge-patch14-448 --lm Qwen3-1.7B --out fresh-2b
    """
    import re

    faults = []
    is_new = vision is not None or lm is not None
    targets = [target for target in (out, vit, gguf) if target is not None]
    if (model is None) != is_new:
        faults.append("give either MODEL, or --vision and --lm for a new one")
    elif is_new and (vision is None or lm is None):
        faults.append("a new model needs both --vision and --lm")
    if len(targets) != 1:
        faults.append("give one of --out, --vit and --gguf")
    if is_new and out is None:
        faults.append("a new model needs --out")
    for name, path in (("--vision", vision), ("--lm", lm)):
        if path is not None and not _is_model(path):
            faults.append(f"{name} {path}: no model folder (it would hold a config.json)")
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        faults.append(f"--adapter {adapter}: no adapter (it would hold an adapter_config.json)")
    faults += [f"{target} exists; choose a new place" for target in targets if target.exists()]
    fresh_only = {"--side": side, "--anyres": anyres or None, "--seed": seed}
    faults += [f"{name} is for a new model" for name, given in fresh_only.items() if given is not None and not is_new]
    if adapter is not None and (is_new or out is None):
        faults.append("--adapter goes with MODEL and --out")
    if gguf_type is not None and gguf is None:
        faults.append("--gguf-type goes with --gguf")
    if dtype is not None and gguf is not None:
        faults.append("--dtype is for folders; a GGUF file has --gguf-type")
    if dtype not in (None, "bf16", "fp16", "fp32"):
        faults.append(f"--dtype {dtype}: bf16, fp16 or fp32")
    if gguf_type not in (None, "bf16", "f16", "q8_0"):
        faults.append(f"--gguf-type {gguf_type}: bf16, f16 or q8_0")
    if not re.fullmatch(r"[1-9]\d*([KMGT]i?B)?", max_shard_size):
        faults.append(f"--max-shard-size {max_shard_size}: a number and a unit, such as 5GB")
    folder = None
    if model is not None:
        try:
            folder = _find_model(model)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    _settle_libraries(0)
    from dataclasses import asdict

    from sailvl.model import SailVLProcessor, checkpoint
    from sailvl.model import convert as conversion
    from sailvl.model.gguf_export import export_gguf

    shards = int(max_shard_size) if max_shard_size.isdigit() else max_shard_size
    try:
        if vision is not None and lm is not None and out is not None:
            written = conversion.from_parts(
                vision,
                lm,
                out,
                seed=seed or 0,
                side=side or 448,
                any_resolution=anyres,
                dtype=dtype,
                max_shard_size=shards,
                licence=licence,
            )
        elif folder is not None and vit is not None:
            written = conversion.export_vit(folder, vit, dtype=dtype, licence=licence)
        elif folder is not None and gguf is not None:
            tokens = SailVLProcessor.from_pretrained(folder)
            written = export_gguf(checkpoint.load(folder), tokens, gguf, kind=gguf_type or "bf16")
        elif folder is not None and out is not None:
            written = conversion.export(
                folder, out, dtype=dtype, adapter=adapter, max_shard_size=shards, licence=licence
            )
    except conversion.ConvertError as error:
        raise InputError(str(error)) from error
    if json:
        _print_json({**asdict(written), "out": str(written.out)})
        return
    for line in (*(f"left out: {line}" for line in written.left_out), *written.notes):
        typer.echo(line)
    size = f"{written.num_parameters:,} parameters, {written.num_bytes:,} bytes, {written.dtype}"
    typer.echo(f"{size}; read back, largest difference {written.max_difference:.3g}")
    typer.echo(str(written.out))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, such as runs/nano.")],
    json: Json = False,
) -> None:
    """Write a run's report again: one HTML file with its figures, answers and curves.

    \b
    sailvl report runs/nano
    """
    if not (run_dir / "curriculum.json").is_file():
        raise InputError(f"{run_dir}: no run here (it would hold a curriculum.json)")
    from sailvl.eval import report as html

    html.write(run_dir, run_dir / "report.html")
    path = run_dir / "report.html"
    _print_json({"report": str(path)}) if json else typer.echo(str(path))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine offers and what is missing; exit code 1 if something is broken.

    \b
    sailvl doctor
    """
    from sailvl.doctor import examine

    findings = examine()
    broken = [finding for finding in findings if finding.state == "broken"]
    if json:
        _print_json({"ok": not broken, "findings": [vars(finding) for finding in findings]})
    else:
        colours = {"ok": "green", "note": "yellow", "broken": "red"}
        for finding in findings:
            state = typer.style(f"{finding.state:<7}", fg=colours[finding.state])
            typer.echo(f"{state} {finding.name:<14} {finding.value}")
            if finding.advice:
                typer.echo(f"{'':<23}{finding.advice}")
    if broken:
        raise typer.Exit(1)


# ---- shared by the verbs ------------------------------------------------------------------------------------------


_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".ogv", ".wmv", ".3gp")
_DRAWN = (".png", ".jpg", ".jpeg", ".webp")


def _decoded(path: str, num_frames: int) -> list[tuple[Image, bool]]:
    """The pictures of a file, RGB, and whether each is a frame: of videos and of GIFs that move."""
    from sailvl.media import is_animated, open_image, to_rgb
    from sailvl.video import video_frames

    suffix = Path(path).suffix.lower()
    if suffix in _VIDEOS or (suffix == ".gif" and is_animated(path)):
        return [(frame, True) for frame in video_frames(path, num_frames)]
    return [(to_rgb(open_image(Path(path), name=path)), False)]


def _box_faults(out: Path, inputs: list[str]) -> list[str]:
    """What is wrong with drawing boxes there."""
    faults = []
    if not inputs:
        faults.append("--boxes needs a picture to draw on")
    if out.suffix.lower() not in _DRAWN:
        faults.append(f"--boxes {out}: a picture's name is needed ({', '.join(_DRAWN)})")
    if not out.parent.is_dir():
        faults.append(f"--boxes {out}: no folder {out.parent}")
    if any(Path(path).resolve() == out.resolve() for path in inputs):
        faults.append(f"--boxes {out}: this is the picture itself; choose another name")
    return faults


def _draw(answer: str, picture: Image, out: Path, *, quiet: bool) -> list[dict[str, Any]]:
    """Save the picture with the answer's boxes drawn on it, and say where; without boxes nothing is written."""
    from dataclasses import asdict

    from sailvl.grounding import draw_boxes, parse_boxes

    found = parse_boxes(answer, *picture.size)
    if found:
        scratch = out.with_name(f".{os.getpid()}-{out.name}")
        try:
            draw_boxes(picture, found).save(scratch)
            os.replace(scratch, out)
        finally:
            scratch.unlink(missing_ok=True)
    if not quiet:
        says = f"{len(found)} {'box' if len(found) == 1 else 'boxes'}: {out}" if found else "no boxes in the answer"
        typer.echo(says, err=True)
    return [asdict(box) for box in found]


def _answer(engine: Engine, request: Request, *, aloud: bool) -> Completion:
    """The one answer to a request, blanks around it cut off; ``aloud`` prints it as it comes."""
    from sailvl.engine.base import stream
    from sailvl.types import Completion, RecordError

    text, blanks, ids = "", "", list[int]()
    for delta in stream(engine, request):
        if delta.finish_reason == "error":
            raise RecordError(delta.error)
        said = (blanks + delta.text).rstrip()
        blanks = (blanks + delta.text)[len(said) :]
        said = said if text else said.lstrip()
        text += said
        ids += delta.ids
        if aloud and said:
            typer.echo(said, nl=False)
        if delta.finish_reason is not None:
            return Completion(text=text, ids=tuple(ids), finish_reason=delta.finish_reason)
    raise AssertionError("an answer without an end")


def _read_recipe(source: str, overrides: list[str], factor: float = 1) -> Curriculum:
    from sailvl.curriculum import shrink
    from sailvl.recipes import read

    curriculum = read(source, overrides)
    return shrink(curriculum, factor) if factor > 1 else curriculum


def _run(curriculum: Curriculum, out: Path, workers: int, threads: int, json: bool) -> None:
    from sailvl.run import run as run_curriculum

    _settle_libraries(threads)
    again = f"interrupted; the same command continues where it stopped: {_command_line()}"
    try:
        if json:
            reports = run_curriculum(curriculum, out, workers=workers)
        elif sys.stdout.isatty():
            with _progress() as progress:
                say = functools.partial(progress.console.print, markup=False, highlight=False)
                reports = run_curriculum(curriculum, out, workers=workers, progress=progress, say=say)
        else:
            reports = run_curriculum(curriculum, out, workers=workers, say=_say)
    except KeyboardInterrupt:
        typer.echo(again, err=True)
        raise typer.Exit(130) from None
    if json:
        _print_json(_summary(out, reports))
        return
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(f'ask it: sailvl ask picture.png "What is this?" --model {out}')


def _summary(out: Path, reports: list[StageReport]) -> dict[str, Any]:
    stages = [{"skipped": report.skipped, "model": str(report.model), **report.done} for report in reports]
    return {"out": str(out), "report": str(out / "report.html"), "stages": stages}


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
    )


def _say(line: str) -> None:
    typer.echo(line)


def _settle_libraries(threads: int) -> None:
    """Set the threads, and stop transformers from drawing bars for files that take a tenth of a second."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads:
        torch.set_num_threads(threads)


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


def _find_model(given: Path | None) -> Path:
    from sailvl.run import finished_models

    if given is not None and _is_model(given):
        return given
    run_dir = given if given is not None else Path("runs/nano")
    found = finished_models(run_dir)
    if found:
        return found[0]
    if given is not None:
        raise InputError(f"{given}: neither a model folder (config.json) nor a run with a finished stage")
    raise InputError("no model yet: make one with `sailvl run nano` (minutes, on a CPU), or name one with --model DIR")


def _base(adapter: Path) -> Path:
    """The model folder that an adapter was trained on."""
    from sailvl.model.lora import AdapterError, base_of

    try:
        found = base_of(adapter)
    except AdapterError as error:
        raise InputError(str(error)) from error
    if found is None:
        raise InputError(f"{adapter}: the model it was trained on is not where it was; name it with --model")
    return found


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json_module.dumps(value, ensure_ascii=False))


def _command_line() -> str:
    import shlex

    return shlex.join(["sailvl", *sys.argv[1:]])


def main() -> None:
    """Run the command and leave with its exit code."""
    # Threads that wait for each other spin briefly, then sleep: spinning on, they lose a whole scheduler slice at each
    # of a step's thousands of parallel regions whenever anything else runs. Read when torch loads its OpenMP library.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments = sys.argv[1:]
    ends = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:ends]
    arguments = [word for index, word in enumerate(arguments) if index >= ends or word != "--debug"]
    code = _main(arguments or ["--help"], debug)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `sailvl plan nano | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _main(arguments: list[str], debug: bool) -> int:
    try:
        result = app(arguments, prog_name="sailvl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UsageError as error:
        usage = f"\n{error.ctx.get_usage()}" if error.ctx else ""
        return _fail(f"{error.format_message()}{usage}", 2, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130, debug)
    except BrokenPipeError:
        return 0
    except Exception as error:  # noqa: BLE001  (the outermost place: a user gets a line and an exit code)
        return _fail(*_explain(error), debug)


def _explain(error: Exception) -> tuple[str, int]:
    from sailvl.config import ConfigError
    from sailvl.lock import LockedError
    from sailvl.media import MediaError
    from sailvl.types import RecordError

    if isinstance(error, (InputError, ConfigError, MediaError, RecordError)):
        return str(error), 2
    if isinstance(error, (OSError, LockedError)):
        return str(error), 1
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _fail(message: str, code: int, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    for line in message.splitlines():
        typer.secho(line, fg="red", err=True)
    return code
