"""LoRA: low-rank adapters beside frozen linear layers, in peft's own format (arXiv 2106.09685; extra ``lora``).

Every linear layer of the chosen parts, W x, becomes W x + (alpha / rank) B A x with A [rank, in] drawn from the seed
and B [out, rank] zero, so that a model with fresh adapters is the model without them. Embeddings and the head stay as
they are, and so do the router and the experts of a sparse model: transformers fuses a layer's experts into one tensor,
which is no linear layer, and peft would build the whole stack's update anew in every forward pass. There is no dropout:
adapters draw no random numbers while they train, and resuming stays exact.

A folder holds adapter_config.json and adapter_model.safetensors. Its names are those of the modules in
``SailVLForConditionalGeneration``, in full, so plain ``peft.PeftModel.from_pretrained`` finds them, and vLLM, which
runs the same classes, too; but vLLM applies those of the language model alone, and passes over others with a warning.

Reading is strict: settings beyond LoRA's own are refused (some name modules to import, or change the base when they are
read), and so is an adapter whose tensors do not fit, before anything is computed with it.
Cost: rank x (in + out) weights a layer. The report does not use adapters.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sailvl.files import force_to_disk, replace_folder

from . import SailVLForConditionalGeneration
from .checkpoint import CheckpointError, fresh_folder, load, part_parameters, refuse_pickles

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"
"""What peft calls the adapter inside of a model; files leave it out."""

_PREFIX = "base_model.model."
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight")
_TAKEN = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "lora_bias"),
    *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform"),
    "layers_pattern",
}
_IGNORED = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "lora_dropout", "init_lora_weights", "runtime_config"),
}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to draw the first weights that leave the base as it is."""


class AdapterError(ValueError):
    """An adapter that cannot be made or used; the message names its folder and the model."""


def targets(model: SailVLForConditionalGeneration, parts: Iterable[str]) -> list[str]:
    """Names of the linear layers of ``parts`` (of ``checkpoint.PARTS``), the head left out, in the model's order."""
    weights = {id(parameter) for part in parts for _, parameter in part_parameters(model, part)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in weights and module is not model.lm_head
    ]


def attach(model: SailVLForConditionalGeneration, parts: Sequence[str], *, rank: int, alpha: float, seed: int) -> None:
    """Put fresh adapters beside the linear layers of ``parts``, in place; they alone can learn then.

    The same seed gives the same adapters, whatever other random numbers are drawn. Raises AdapterError without peft.
    """
    peft = _peft()
    names = targets(model, parts)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    config.target_modules = names  # peft shortens long lists to endings, in any order
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            first = model.get_submodule(name).lora_A[NAME].weight
            bound = 1 / math.sqrt(first.shape[1])
            first.copy_(torch.empty(first.shape).uniform_(-bound, bound, generator=generator))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def detach(model: SailVLForConditionalGeneration) -> None:
    """Take the adapters away, in place: the base as it was, bit for bit."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            model.set_submodule(name, module.base_layer)
    forget(model)


def forget(model: SailVLForConditionalGeneration) -> None:
    """Remove what peft notes on a model, or it warns of a second adapter that is the first."""
    if hasattr(model, "peft_config"):
        del model.peft_config


def save(model: SailVLForConditionalGeneration, path: str | Path) -> None:
    """Write the adapters of ``attach`` to a folder in peft's format, complete or not at all.

    The base's folder is recorded as the model knows it; loading does not depend on it. Raises CheckpointError if
    writing fails; an earlier folder is then untouched.
    """
    tensors = {
        f"{_PREFIX}{name.replace(f'.{NAME}.', '.')}": value.detach().cpu().contiguous()
        for name, value in model.named_parameters()
        if is_adapter(name)
    }
    base = Path(os.path.abspath(model.name_or_path)) if model.name_or_path else None
    settings = model.peft_config[NAME].to_dict() | {
        "base_model_name_or_path": str(base) if base is not None and base.is_dir() else model.name_or_path or None,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "inference_mode": True,
    }
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)  # by default: what is a set is a sorted list
    target = Path(path).absolute()
    fresh = fresh_folder(target)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        (fresh / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        for file in (fresh / CONFIG, fresh / WEIGHTS, fresh):
            force_to_disk(file)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise CheckpointError(f"{target}: saving the adapter failed ({error}); free some space") from error
    replace_folder(fresh, target, target.with_name(f".{target.name}.old-{os.getpid()}"))


def base_of(adapter: str | Path) -> Path | None:
    """The base model's folder as the adapter records it, if it is still there. Raises AdapterError for no adapter."""
    recorded = _settings(Path(adapter)).get("base_model_name_or_path")
    return Path(recorded) if isinstance(recorded, str) and (Path(recorded) / "config.json").is_file() else None


def load_adapted(
    adapter: str | Path, base: str | Path | None = None, *, dtype: torch.dtype | str | None = None
) -> SailVLForConditionalGeneration:
    """The base with the adapter beside its weights, for inference; ``base`` defaults to the recorded folder.

    Raises AdapterError if base and adapter do not fit or the recorded folder is gone, CheckpointError as ``load``.
    """
    found = base_of(adapter) if base is None else Path(base)
    if found is None:
        recorded = _settings(Path(adapter)).get("base_model_name_or_path")
        raise AdapterError(f"{adapter}: its base model ({recorded}) is not there; say where it is now")
    model = load(found, dtype=dtype)
    open_adapter(model, adapter)
    return model


def open_adapter(model: SailVLForConditionalGeneration, adapter: str | Path) -> Any:
    """Put a folder's adapters into ``model``, in place, for inference; gives peft's ``PeftModel`` around it.

    Raises AdapterError (``model`` may then hold a part of them) if the folder is no LoRA adapter, asks for more than
    LoRA, or belongs to another model, or peft is not installed; CheckpointError if its weights are pickled.
    """
    peft, folder = _peft(), Path(adapter)
    config = _config(peft, folder)
    shapes = _shapes(folder)
    fault = f"{folder}: the adapter does not fit the model {model.name_or_path or 'in memory'}"
    _check_fit(model, shapes, fault)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what fits and what does not is checked here, before and after
            wrapped = peft.PeftModel.from_pretrained(model, folder, config=config)
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise AdapterError(f"{fault} ({first})") from error
    odd = sorted(shapes.keys() ^ peft.get_peft_model_state_dict(wrapped).keys())
    if odd:
        raise AdapterError(f"{folder}: {len(odd)} tensors are missing or belong to another model, first {odd[0]}")
    wrapped.eval()
    return wrapped


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415  (an extra, and seconds to import)
    except ImportError as error:
        raise AdapterError("adapters need peft: pip install 'sailvl[lora]'") from error
    return peft


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise AdapterError(f"{folder}: no adapter here (it would hold an {CONFIG})")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read ({error})") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else "no JSON object"
        raise AdapterError(f"{file}: not a LoRA adapter (peft_type is {kind})")
    return settings


def _config(peft: Any, folder: Path) -> Any:
    """peft's configuration of what was stored, made from the fields that plain LoRA has."""
    settings, usual = _settings(folder), peft.LoraConfig().to_dict()
    beyond = sorted(
        name for name, value in settings.items()
        if value and value != usual.get(name) and name not in _TAKEN | _IGNORED
    )  # fmt: skip
    if settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        beyond.append("init_lora_weights")
    if beyond:
        raise AdapterError(f"{folder / CONFIG}: asks for more than plain LoRA: {', '.join(beyond)}")
    try:
        return peft.LoraConfig(**{name: settings[name] for name in _TAKEN & settings.keys()})
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{folder / CONFIG}: {error}") from error


def _shapes(folder: Path) -> dict[str, list[int]]:
    refuse_pickles(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS}: cannot be read ({error})") from error


def _check_fit(model: nn.Module, shapes: dict[str, list[int]], fault: str) -> None:
    modules = dict(model.named_modules())
    for key, shape in sorted(shapes.items()):
        found = _TENSOR.fullmatch(key)
        if found is None or "base_layer" in found[1]:  # experts, whose names peft nests
            continue
        module = modules.get(found[1])
        if module is None:
            raise AdapterError(f"{fault}: it adapts {found[1]}, which the model does not have")
        axis, side = (-1, "in_features") if found[2] == "A" else (0, "out_features")
        width = getattr(module, side, None)
        if width is not None and (len(shape) != 2 or shape[axis] != width):
            raise AdapterError(f"{fault}: {found[1]} has {side} {width}, and the adapter a matrix of {shape}")
