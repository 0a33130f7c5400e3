"""Recipes: the shipped ones are values in the modules beside this one; a user's own is a YAML or JSON file.

A file is either a whole curriculum (it has ``stages``) or flat: a model, sources, and at the top the fields of one
training stage. Paths in a file are relative to that file, so that a recipe can lie beside its data and run from
anywhere; paths in overrides are relative to where the command runs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sailvl.config import ConfigError, build, did_you_mean, load, override, parse, to_dict
from sailvl.curriculum import Curriculum, check

RECIPES: dict[str, tuple[str, str]] = {
    "nano": ("sailvl.recipes.nano", "NANO"),
}
"""Recipe -> (module, value)."""

WHOLE = ("name", "model", "sources", "probe")
"""Keys of a flat recipe that belong to the curriculum; every other key belongs to its one stage."""

PATHS = ("path", "image_root", "tokenizer")


def recipe(name: str) -> Curriculum:
    """Give the shipped recipe of this name; ConfigError for an unknown one."""
    if name not in RECIPES:
        raise ConfigError([("", f"'{name}' is neither a file nor a shipped recipe; {did_you_mean(name, RECIPES)}")])
    module, attribute = RECIPES[name]
    value = vars(importlib.import_module(module))[attribute]
    assert isinstance(value, Curriculum)
    return value


def read(source: str | Path, overrides: Sequence[str] = ()) -> Curriculum:
    """Read a shipped recipe (by name) or a file, change it by ``key.path=value`` overrides, and check its graph.

    Raises ConfigError with every fault; its paths are as the file has them, also in a flat recipe.
    """
    path = Path(source)
    if str(source) in RECIPES or not (
        path.exists() or path.suffix in (".yaml", ".yml", ".json") or path.name != str(source)
    ):
        return _checked(load(Curriculum, to_dict(recipe(str(source))), overrides), str(source))
    try:
        data, errors = parse(path)
    except OSError as error:
        raise ConfigError([("", error.strerror or str(error))], str(path)) from None
    _anchor(data, path.resolve().parent)
    errors += override(data, overrides)
    if "stages" in data:
        return _checked(build(Curriculum, data, errors, str(path)), str(path))
    try:
        return _checked(build(Curriculum, _from_flat(data, path), errors, str(path)), str(path))
    except ConfigError as error:
        raise ConfigError([(at.removeprefix("stages.0."), text) for at, text in error.errors], str(path)) from None


def _checked(curriculum: Curriculum, origin: str) -> Curriculum:
    faults = check(curriculum)
    if faults:
        raise ConfigError(faults, origin)
    return curriculum


def _from_flat(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Wrap one stage in a curriculum. The name defaults to the file's, the data to the only source there is."""
    name = data.get("name") or re.sub(r"[^a-z0-9_-]+", "-", path.stem.lower()).strip("-_") or "train"
    stage = {key: item for key, item in data.items() if key not in WHOLE}
    sources = data.get("sources")
    if "data" not in stage and isinstance(sources, dict) and len(sources) == 1:
        stage["data"] = {"shares": dict.fromkeys(sources, 1.0)}
    whole = {key: item for key, item in data.items() if key in WHOLE}
    return whole | {"name": name, "stages": [{"kind": "train", "name": name} | stage]}


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a file's sources and model absolute."""
    sources = data.get("sources")
    for value in [data.get("model"), *(sources.values() if isinstance(sources, dict) else [])]:
        for key in PATHS:
            if isinstance(value, dict) and isinstance(value.get(key), str):
                value[key] = str(folder / Path(value[key]).expanduser())
