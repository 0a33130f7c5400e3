"""The verb that asks: pictures, clips and a question in, an answer out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sailvl.cli.app import InputError, Json, Threads, app, find_model, print_json, settle_libraries

if TYPE_CHECKING:
    from PIL.Image import Image

    from sailvl.engine.base import Engine, Request
    from sailvl.types import Completion

_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".ogv", ".wmv", ".3gp")
_DRAWN = (".png", ".jpg", ".jpeg", ".webp")


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
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Language model of sailvl convert --gguf, run by llama.cpp.")
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
    sailvl ask photo.jpg "What is this?" --model SAIL-VL2-2B --gguf lm.gguf
    """
    import time

    from sailvl.geometry import ImagePolicy
    from sailvl.media import MediaError
    from sailvl.types import Message, Picture, Record

    if quant not in (None, "int8"):
        raise InputError(f"--quant is '{quant}'; it can be int8")
    if gguf is not None and (quant or adapter):
        raise InputError("--gguf is a whole language model already: it goes with neither --quant nor --adapter")
    if gguf is not None and not gguf.is_file():
        raise InputError(f"{gguf}: no such file")
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
    folder = find_model(model) if adapter is None or model is not None else _base(adapter)
    record = Record(id="question", messages=(Message(role="user", text=question),), pictures=tuple(pictures))
    settle_libraries(threads)
    from sailvl.engine.base import Request, Sampling
    from sailvl.engine.local import Local
    from sailvl.run import load_model

    loaded = load_model(folder, int8=quant == "int8", adapter=adapter)
    engine = Local(*loaded, capacity=1) if gguf is None else _llama_cpp(loaded, gguf)
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
        print_json({"model": str(folder), "question": question, "images": paths, **found, "seconds": seconds})


def _llama_cpp(loaded: tuple[Any, Any], gguf: Path) -> Engine:
    """The engine whose language model is a GGUF file."""
    from sailvl.engine.llamacpp import LlamaCpp, LlamaRows

    try:
        return LlamaCpp(*loaded, LlamaRows(gguf, capacity=1))
    except ValueError as error:
        raise InputError(f"{gguf}: {error}") from error


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

    from sailvl.files import writing
    from sailvl.grounding import draw_boxes, parse_boxes

    found = parse_boxes(answer, *picture.size)
    if found:
        kind = {".png": "PNG", ".webp": "WEBP"}.get(out.suffix.lower(), "JPEG")
        with writing(out, "wb") as file:
            draw_boxes(picture, found).save(file, kind)
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
