"""The README.md of a model folder: what the model is, how to load it, and where it came from.

The front matter is what hubs index by. Nothing is claimed that the folder does not show: sizes are counted, the
training record is the one written beside the model, and a licence is named only if somebody named it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UNKNOWN_LICENCE = "unknown"
"""The hubs' word for a licence nobody stated."""

_PROVENANCE = ("stage", "steps", "samples", "tokens", "tiles", "loss", "score", "precision", "commit", "finished")


def card(
    title: str,
    *,
    facts: Sequence[tuple[str, str]],
    alone: bool = False,
    licence: str = UNKNOWN_LICENCE,
    made_from: Sequence[str] = (),
    record: dict[str, Any] | None = None,
) -> str:
    """The text of a model card.

    ``facts`` are rows of a table, ``made_from`` lines about the sources, ``record`` a stage's ``done.json``;
    ``alone`` is for an encoder without language model.
    """
    tags = ["image-feature-extraction", "sailvit"] if alone else ["image-text-to-text", "sailvl"]
    head = ["---", f"license: {json.dumps(licence)}", "library_name: transformers", f"pipeline_tag: {tags[0]}"]
    head += ["tags:", f"- {tags[1]}", *([] if alone else ["language:", "- en", "- zh"]), "---", ""]
    what = (
        "A SAIL-ViT vision encoder (an AIMv2 encoder: square tiles to patch features)."
        if alone
        else "A SAIL-VL2 vision-language model (technical report arXiv 2509.14033): SAIL-ViT, a projector and Qwen3."
    )
    lines = [*head, f"# {title}", "", what, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts]
    lines += ["", "## Use", "", "No code of this folder is run: the classes are those of the `sailvl` package.", ""]
    lines += ["```python", (_USE_ALONE if alone else _USE).replace("FOLDER", title), "```", ""]
    if not alone:
        lines += [f'Or from the command line: `sailvl ask picture.png "What is this?" --model {title}`.', ""]
    if made_from or record:
        lines += ["## Provenance", "", *(f"- {line}" for line in made_from), *_lines(record or {}), ""]
    return "\n".join(lines)


_USE = """\
import sailvl  # the Auto classes now know the model
from PIL import Image
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("FOLDER")
model = AutoModel.from_pretrained("FOLDER", dtype="auto")
image = Image.open("picture.png")
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt").to(model.dtype)
ids = model.generate(**inputs, max_new_tokens=128)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(ids, skip_special_tokens=True)[0])"""

_USE_ALONE = """\
import sailvl  # the Auto classes now know the encoder
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("FOLDER")
encoder = AutoModel.from_pretrained("FOLDER", dtype="auto")
inputs = processor(Image.open("picture.png"), return_tensors="pt")
inputs.pop("num_tiles")
features = encoder(**inputs).last_hidden_state  # [pictures, patches, width]
layers = encoder(**inputs, output_hidden_states=True).hidden_states"""


def _lines(record: dict[str, Any]) -> list[str]:
    """A stage's record, one line per number worth a line."""
    found = [f"- {name.replace('_', ' ')}: {record[name]}" for name in _PROVENANCE if record.get(name) is not None]
    versions = record.get("versions") or {}
    if isinstance(versions, dict) and versions:
        found.append("- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return found


def record_beside(folder: Path) -> dict[str, Any] | None:
    """The training record of a model in a run (``STAGE/done.json`` beside ``STAGE/model``); None if there is none."""
    try:
        found = json.loads((folder.absolute().parent / "done.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "stage" in found else None


def licence_of(folder: Path) -> str:
    """The licence in the front matter of a folder's README.md, or ``UNKNOWN_LICENCE``."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return UNKNOWN_LICENCE
    head = text.split("\n---", 1)[0].splitlines() if text.startswith("---") else []
    named = [line.partition(":")[2].strip().strip("\"'") for line in head if line.startswith("license:")]
    return named[0] if named and named[0] else UNKNOWN_LICENCE
