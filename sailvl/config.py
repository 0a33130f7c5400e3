"""Typed values in, YAML and JSON out: strict keys, every error at once, and a content hash.

A recipe is a frozen pydantic dataclass made with ``@value``. ``load`` reads the same schema from YAML, JSON or a
mapping, applies ``key.path=value`` overrides, and reports everything that is wrong in one ``ConfigError``.

The text is read by YAML 1.2's core rules, not PyYAML's 1.1: ``1e-5`` is a number, ``yes``/``no``/``on`` stay text
(only ``true``/``false`` are booleans), and a repeated key is an error instead of the last one silently winning.
Validation is strict (``True`` is not 1, ``"8"`` is not 8), in pydantic's JSON mode: the only strict mode in which
mappings become dataclasses and lists become tuples.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
)

import pydantic
import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")
Errors = list[tuple[str, str]]

MAX_NODES = 100_000
"""More values than any recipe has; stops a file whose aliases multiply."""

MAX_DEPTH = 50

NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
WHOLE = re.compile(r"[-+]?\d+")
WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
WORDS |= {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}


class ConfigError(ValueError):
    """Everything wrong with a recipe: ``errors`` holds (path, message) pairs, in the order of the fields."""

    def __init__(self, errors: Iterable[tuple[str, str]], origin: str = "") -> None:
        self.errors: Errors = list(errors)
        self.origin = origin
        lines = [f"{path}: {message}" if path else message for path, message in self.errors]
        super().__init__("\n".join(f"{origin}: {line}" if origin else line for line in lines))


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def value(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only, strictly checked dataclass; ``dataclasses.replace`` checks again."""
    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    made: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=config)
    return cast(type[T], made)


def load(cls: type[T], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> T:
    """Read ``source`` (a YAML or JSON file, or a mapping) as a ``cls``, after applying ``key.path=value`` overrides.

    In an override's path an item of a list is its index or its ``name``: ``stages.pretrain.lr=1e-4``.
    Raises ConfigError with every error found; OSError where the file cannot be read.
    """
    if isinstance(source, Mapping):
        data, errors, origin = to_dict(source), Errors(), ""
    else:
        origin = str(source)
        data, errors = parse(Path(source))
    errors += override(data, overrides)
    return build(cls, data, errors, origin)


def parse(path: Path) -> tuple[dict[str, Any], Errors]:
    """Read a YAML or JSON file to plain data, with the errors that leave something to go on with (repeated keys).

    Raises ConfigError for a file that is not keys and values at all; OSError where it cannot be read.
    """
    errors = Errors()
    data = _parse(path.read_bytes(), str(path), errors)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError([("", f"expected keys and values, found {_say(data)}")], str(path))
    return data, errors


def override(data: dict[str, Any], overrides: Sequence[str]) -> Errors:
    """Change plain data in place by ``key.path=value`` texts; give the errors of those that cannot be applied."""
    errors = Errors()
    for text in overrides:
        _override(data, text, errors)
    return errors


def build(cls: type[T], data: dict[str, Any], errors: Errors, origin: str = "") -> T:
    """Make a ``cls`` of plain data; ConfigError with ``errors`` and all that is wrong with the data."""
    try:
        result = pydantic.TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError([*errors, *_translate_all(cls, data, error)], origin) from None
    if errors:
        raise ConfigError(errors, origin)
    return result


def to_dict(item: Any) -> Any:
    """Turn a value into plain dicts, lists and scalars: what JSON holds, and what ``load`` reads back equal."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: to_dict(getattr(item, field.name)) for field in dataclasses.fields(item)}
    if isinstance(item, Mapping):
        return {str(key): to_dict(inner) for key, inner in item.items()}
    if isinstance(item, (tuple, list)):
        return [to_dict(inner) for inner in item]
    return item


def digest(item: Any) -> str:
    """Hash a value's content: sha256 (hex) of its JSON with sorted keys, so the order of mappings does not count."""
    text = json.dumps(to_dict(item), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """End an error message: the nearest known name if one is near, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.65)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(names)}" if names else "none are defined"


# ---- text to plain data ---------------------------------------------------------------------------------------


def _parse(raw: bytes, origin: str, errors: Errors) -> Any:
    try:
        text = raw.decode("utf-8-sig")
        if origin.endswith(".json"):
            return json.loads(text, object_pairs_hook=lambda pairs: _pairs(pairs, errors))
        node = yaml.compose(text, yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError([("", f"not UTF-8 text: {error}")], origin) from None
    except json.JSONDecodeError as error:
        raise ConfigError([(f"line {error.lineno}", f"not JSON: {error.msg}")], origin) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # not every YAMLError has one
        where = f"line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError([(where, f"not YAML: {problem}")], origin) from None
    except RecursionError:
        raise ConfigError([("", "nested too deeply to be a recipe")], origin) from None
    return _plain(node, "", errors, [0]) if node is not None else None


def _pairs(pairs: list[tuple[str, Any]], errors: Errors) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    errors += [(key, f"given {keys.count(key)} times") for key in dict.fromkeys(keys) if keys.count(key) > 1]
    return dict(pairs)


def _plain(node: yaml.Node, path: str, errors: Errors, seen: list[int]) -> Any:
    seen[0] += 1
    if seen[0] > MAX_NODES:
        if seen[0] == MAX_NODES + 1:
            errors.append((path, f"more than {MAX_NODES} values; does an alias (*name) repeat itself?"))
        return None
    if path.count(".") > MAX_DEPTH:
        errors.append((path[:20] + "...", f"more than {MAX_DEPTH} levels; does an alias (*name) contain itself?"))
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, _join(path, index), errors, seen) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        result = {}
        for key, inner in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                errors.append((path, f"line {line}: a key must be a word"))
            elif name == "<<" and key.style is None:
                errors.append((path, f"line {line}: merge keys (<<) are not read; write the keys out"))
            elif name in lines:
                errors.append((_join(path, name), f"given twice, in lines {lines[name]} and {line}"))
            else:
                lines[name] = line
                result[name] = _plain(inner, _join(path, name), errors, seen)
        return result
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return str(node.value) if quoted else _scalar(str(node.value))


def _scalar(text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    if WHOLE.fullmatch(text):
        return int(text) if len(text) < 4000 else text
    if not NUMBER.fullmatch(text):
        return text
    number = float(text)
    return int(number) if "e" in text.lower() and number.is_integer() and abs(number) < 1e15 else number


# ---- overrides ------------------------------------------------------------------------------------------------


def _override(data: dict[str, Any], override: str, errors: Errors) -> None:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        errors.append((override, "an override is written key.path=value, as in stages.0.lr=1e-4"))
        return
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        new = _plain(node, path, errors, [0]) if node is not None else None
    except (yaml.YAMLError, RecursionError):
        new = text
    here: Any = data
    for index, part in enumerate(parts):
        last, done = index == len(parts) - 1, ".".join(parts[:index])
        if isinstance(here, list):
            position = _position(here, part)
            if position is None:
                names = [str(item["name"]) for item in here if isinstance(item, dict) and "name" in item]
                errors.append((f"{done}.{part}", f"no such item of {len(here)}; {did_you_mean(part, names)}"))
                return
            if last:
                here[position] = new
            here = here[position]
        elif isinstance(here, dict):
            if last:
                here[part] = new
            elif here.get(part) is None:
                here[part] = {}
            here = here[part]
        else:
            errors.append((path, f"{done} is {_say(here)}, it has no key '{part}'"))
            return


def _position(items: list[Any], part: str) -> int | None:
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == part:
            return index
    return int(part) if part.isdecimal() and int(part) < len(items) else None


# ---- pydantic's errors in plain words ---------------------------------------------------------------------------

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "dataclass_type": "keys and values",
    "model_attributes_type": "keys and values",
}


def _translate_all(cls: Any, data: Any, error: pydantic.ValidationError) -> Errors:
    found = [(item["type"], *_translate(cls, data, item)) for item in error.errors(include_url=False)]
    # A list counts as too short when its items are bad, and a union complains about every arm: keep the cause alone.
    causes = {path for kind, path, _ in found if kind not in ("too_short", "tuple_type", "dict_type")}
    kept = [
        (path, message)
        for kind, path, message in found
        if kind not in ("too_short", "tuple_type", "dict_type")
        or not any(cause == path or cause.startswith(f"{path}.") for cause in causes)
    ]
    return list({path: (path, message) for path, message in reversed(kept)}.values())[::-1]


def _translate(cls: Any, data: Any, item: Any) -> tuple[str, str]:
    path, expected, parent = _locate(cls, data, item["loc"])
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return path, f"unknown key; {did_you_mean(path.rpartition('.')[2], _field_names(parent))}"
    if kind == "missing":
        return path, "is required"
    if kind == "union_tag_not_found":
        return path, f"needs a kind: {' or '.join(_kinds(expected))}"
    if kind == "union_tag_invalid":
        return _join(
            path, "kind"
        ), f"'{context['tag']}' is unknown; {did_you_mean(str(context['tag']), _kinds(expected))}"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        return path, f"{_say(given)} is not one of {context['expected']}" + _near(given, options)
    if kind in EXPECTED:
        hint = "; write true or false" if kind == "bool_type" and given in ("yes", "no", "on", "off") else ""
        return path, f"must be {EXPECTED[kind]}, not {_say(given)}{hint}"
    if kind == "value_error":
        return path, str(context["error"])
    if kind in ("too_short", "too_long"):
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return path, f"needs {limit} item(s)"
    message = re.sub(r"^(Input|Tuple|Value|String|List|Dictionary) should ", "must ", item["msg"])
    message = message[0].lower() + message[1:]
    return path, message if isinstance(given, (dict, list)) else f"{message}, not {_say(given)}"


def _near(given: Any, options: list[str]) -> str:
    near = difflib.get_close_matches(str(given), options, n=1, cutoff=0.65)
    return f"; did you mean '{near[0]}'?" if near else ""


def _locate(cls: Any, data: Any, loc: Sequence[str | int]) -> tuple[str, Any, Any]:
    """Follow pydantic's location through type and data: the path without union tags, the type there, its parent."""
    path, expected, parent = "", cls, None
    for part in loc:
        tagged = len(_members(expected)) > 1 and isinstance(part, str) and ("[" in part or _kind(data) == part)
        expected = _choose(expected, data)
        if tagged or (isinstance(part, str) and not isinstance(data, dict)):
            continue
        path, parent = _join(path, part), expected
        expected = _inside(expected, part)
        if isinstance(data, dict):
            data = data.get(str(part))
        else:
            data = data[part] if isinstance(data, list) and isinstance(part, int) and part < len(data) else None
    return path, expected, parent


def _members(expected: Any) -> tuple[Any, ...]:
    while get_origin(expected) is Annotated:
        expected = get_args(expected)[0]
    if get_origin(expected) in (Union, types.UnionType):
        return tuple(leaf for arm in get_args(expected) if arm is not type(None) for leaf in _members(arm))
    return (expected,)


def _choose(expected: Any, data: Any) -> Any:
    members = _members(expected)
    return next((arm for arm in members if _kind(data) in _kinds(arm)), members[0])


def _kind(data: Any) -> Any:
    return data.get("kind") if isinstance(data, dict) else None


def _kinds(expected: Any) -> list[str]:
    arms = [arm for arm in _members(expected) if dataclasses.is_dataclass(arm)]
    return [str(field.default) for arm in arms for field in dataclasses.fields(arm) if field.name == "kind"]


def _inside(expected: Any, part: str | int) -> Any:
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        found = vars(expected).get("__pydantic_fields__", {}).get(part)
        return found.annotation if found else Any
    arguments = get_args(expected)
    if get_origin(expected) is tuple and arguments:
        return arguments[0] if arguments[-1] is Ellipsis else arguments[min(int(part), len(arguments) - 1)]
    return arguments[-1] if arguments and get_origin(expected) is not Literal else Any


def _field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _join(path: str, part: str | int) -> str:
    return f"{path}.{part}" if path else str(part)


def _say(item: Any) -> str:
    if item is None:
        return "nothing"
    if isinstance(item, bool):
        return f"the boolean {str(item).lower()}"
    if isinstance(item, str):
        return f"the text {item[:60]!r}"
    if isinstance(item, dict):
        return "keys and values"
    return "a list" if isinstance(item, (list, tuple)) else str(item)
