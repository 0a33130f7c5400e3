"""Verbs that make models of models: average, convert, even out experts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sailvl.cli.app import InputError, Json, Threads, app, find_model, is_model, print_json, settle_libraries


@app.command()
def soup(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Model folders of one family.")],
    out: Annotated[Path, typer.Option(help="Folder for the average; must not exist yet.")],
    base: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="What they branched from: warn of those that did not.")
    ] = None,
    greedy: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Average only those that lower the loss on these conversations."),
    ] = None,
    json: Json = False,
) -> None:
    """Average models that branched from one trained model: all of them, or those that help.

    \b
    sailvl soup runs/a/stages/01-sft-*/model runs/b/stages/01-sft-*/model --out runs/soup
    sailvl soup a/model b/model c/model --base sft-2/model --greedy held_out.jsonl --out runs/soup
    """
    given = [*models, *([base] if base else [])]
    faults = [f"{path}: no model folder (it would hold a config.json)" for path in given if not is_model(path)]
    if len(models) < 2:
        faults.append("an average needs at least two models")
    if out.exists():
        faults.append(f"{out} exists; choose a new folder")
    if greedy is not None and not greedy.is_file():
        faults.append(f"{greedy}: no such file")
    if faults:
        raise InputError("\n".join(faults))
    from sailvl.train.soup import SoupError, greedy_soup, homology
    from sailvl.train.soup import soup as average

    found: dict[str, Any] = {"model": str(out), "of": [str(path) for path in models]}
    try:
        found["warnings"] = homology(models, base).faults() if base else []
        for warning in found["warnings"]:
            typer.secho(warning, fg="yellow", err=True)
        if greedy is None:
            average(models, out)
        else:
            made = greedy_soup(models, out, _held_out_score(greedy))
            found["of"] = [str(path) for path in made.kept]
            found |= {"loss": -made.score, "losses": {str(path): -score for path, score in made.scores}}
    except SoupError as error:
        raise InputError(str(error)) from error
    if json:
        print_json(found)
        return
    for path, loss in found.get("losses", {}).items():
        typer.echo(f"loss {loss:.4f}  {path}{'' if path in found['of'] else '  (left out)'}")
    typer.echo(str(out) if greedy is None else f"loss {found['loss']:.4f}  {out}")


def _held_out_score(data: Path) -> Callable[[Path], float]:
    """Minus a model's mean loss on a file's conversations, the same packs for every model."""
    from sailvl.curriculum import Train, Validation
    from sailvl.data.source import JsonlSource
    from sailvl.run import load_model
    from sailvl.train.step import resolve_precision
    from sailvl.train.validate import held_out, mean_loss
    from sailvl.types import Mixture

    source, mixture = JsonlSource(data, "held-out"), Mixture(shares={"held-out": 1.0})
    stage = Train(
        name="soup", data=mixture, trains=("lm",), steps=1, lr=1.0, max_tokens=4096, max_tiles=64,
        validation=Validation(data=mixture, every=1),
    )  # fmt: skip

    def score(folder: Path) -> float:
        model, processor = load_model(folder)
        precision = resolve_precision("auto", model.device)
        loss = mean_loss(model, held_out(stage, {"held-out": source}, processor), precision)
        if loss is None:
            raise InputError(f"{data}: nothing in it is an answer to learn from")
        return -loss

    return score


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
        if path is not None and not is_model(path):
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
            folder = find_model(model)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    settle_libraries(0)
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
        print_json({**asdict(written), "out": str(written.out)})
        return
    for line in (*(f"left out: {line}" for line in written.left_out), *written.notes):
        typer.echo(line)
    size = f"{written.num_parameters:,} parameters, {written.num_bytes:,} bytes, {written.dtype}"
    typer.echo(f"{size}; read back, largest difference {written.max_difference:.3g}")
    typer.echo(str(written.out))


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
    sources, folder = [JsonlSource(text), JsonlSource(multimodal)], find_model(model)
    settle_libraries(threads)
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
        print_json(found | {"layers": [asdict(row) for row in rows]})
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
