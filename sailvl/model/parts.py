"""Reading the parts of a new model: an encoder of the AIMv2 family, and a Qwen3 language model with its tokenizer.

Encoders come under two sets of names: those of AIMv2's authors, which SAIL-ViT and its releases keep, and those of
transformers, which splits the fused ``qkv`` and names the SwiGLU's matrices otherwise. Either may stand behind a prefix
and beside things SAIL-VL2 has no use for (a pooling head, a text tower): what is left out is listed, what is unknown is
refused, so that nothing gets lost silently. Folders are read, never executed: ``auto_map`` is ignored.

Cost: tensors are mapped from the files, not copied; splitting or casting copies one at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .attention import PACKED
from .chat import GROUNDING_TOKENS, IMAGE_END, IMAGE_START, IMAGE_TOKEN
from .checkpoint import CheckpointError, load_whole, refuse_pickles
from .configuration import ARCHITECTURES, SailViTConfig
from .vit import SailViT

SAIL_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_TOKEN, *GROUNDING_TOKENS)
"""The special tokens of SAIL-VL2 in the order of the released tokenizer, which appends them to Qwen's."""

_APPLE, _LIBRARY = "preprocessor.patchifier.proj.weight", "embeddings.patch_embed.weight"

_FROM_LIBRARY = (
    (r"embeddings\.patch_embed\.", "preprocessor.patchifier.proj."),
    (r"embeddings\.rms_norm\.", "preprocessor.patchifier.norm."),
    (r"encoder\.layers\.(\d+)\.attention\.out_proj\.", r"trunk.blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.rms_norm([12])\.", r"trunk.blocks.\1.norm_\2."),
    (r"encoder\.layers\.(\d+)\.ffn\.gate_proj\.", r"trunk.blocks.\1.mlp.fc1."),
    (r"encoder\.layers\.(\d+)\.ffn\.down_proj\.", r"trunk.blocks.\1.mlp.fc2."),
    (r"encoder\.layers\.(\d+)\.ffn\.up_proj\.", r"trunk.blocks.\1.mlp.fc3."),
    (r"rms_norm\.", "trunk.post_trunk_norm."),
)
_LEFT_OUT = {
    "head.": "the pooling head",
    "attn_pool.": "the pooling head",
    "text_model.": "the text tower",
    "text_encoder.": "the text tower",
    "text_projection.": "the projection of texts",
    "visual_projection.": "the projection of pooled pictures",
    "image_projector.": "the projection of pooled pictures",
    "text_projector.": "the projection of texts",
    "logit_scale": "the contrastive temperature",
    "log_logit_scale": "the contrastive temperature",
    "language_model.": "the language model",
    "mlp1.": "the projector",
}
"""Beginnings of names (before or after the encoder's prefix) that are known and not wanted."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return values


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name to the open file that holds it; raises CheckpointError for pickles and damaged files."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    refuse_pickles(folder)
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
        found |= dict.fromkeys(opened.keys(), opened)
    return found


# ---- the encoder --------------------------------------------------------------------------------------------------


def read_vision(
    folder: Path, *, side: int | None = None, any_resolution: bool = False
) -> tuple[SailViT, list[str], list[str]]:
    """An encoder, what was left out of the folder, and notes on what was changed.

    ``folder`` holds an AIMv2 or SAIL-ViT encoder under either set of names, alone or as a part of a larger model.
    The position table is stretched (bicubic) to tiles of ``side`` pixels if it was made for others.
    Raises CheckpointError if tensors are missing or unknown, or the architecture is another one.
    """
    config = _vision_config(folder, any_resolution)
    with ExitStack() as stack:
        files = open_tensors(folder, stack)
        prefix, library = _layout(folder, files)
        mine, left_out = _sort_out(folder, list(files), prefix)
        weights = {name.removeprefix(prefix): files[name].get_tensor(name) for name in mine}
    weights = _rename(folder, weights) if library else weights
    notes = []
    if "preprocessor.pos_embed" not in weights:
        raise CheckpointError(f"{folder}: no learned position table (an encoder of native resolution has none)")
    table = weights["preprocessor.pos_embed"].reshape(1, -1, config.hidden_size)
    old, new = math.isqrt(table.shape[1]), (side or config.image_size) // config.patch_size
    if old != new:
        square = table.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
        square = nn.functional.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
        table = square.flatten(2).transpose(1, 2).to(table.dtype).contiguous()
        patch = config.patch_size
        notes.append(
            f"position table stretched from {old} x {old} ({old * patch} px) to {new} x {new} ({new * patch} px)"
        )
    weights["preprocessor.pos_embed"] = table
    config.image_size = new * config.patch_size
    with torch.device("meta"):
        vision = SailViT(config)
    expected = {name: tuple(value.shape) for name, value in vision.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    for word, names in (("missing", expected.keys() - given.keys()), ("unknown", given.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"{folder}: {len(names)} {word} tensors, first {sorted(names)[0]}")
    wrong = sorted(name for name in expected if expected[name] != given[name])
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors of another shape than config.json says, first {first}: "
            f"{list(given[first])} instead of {list(expected[first])}"
        )
    vision.load_state_dict(weights, assign=True)
    return vision.requires_grad_(True).eval(), left_out, notes


def _vision_config(folder: Path, any_resolution: bool) -> SailViTConfig:
    values = read_json(folder / "config.json")
    values = values.get("vision_config") or values
    for name in ("qkv_bias", "use_bias", "mlp_bias"):
        if values.get(name):
            raise CheckpointError(f"{folder}: config.json asks for biases ({name}); SAIL-ViT has none")
    if values.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{folder}: hidden_act is '{values['hidden_act']}'; SAIL-ViT's is 'silu'")
    if values.get("any_resolution") and not any_resolution:
        raise CheckpointError(f"{folder}: an encoder of any resolution, which cannot become one of tiles: use --anyres")
    kept = {name: values[name] for name in _VISION_FIELDS if name in values}
    for name in ("image_size", "patch_size"):
        if isinstance(kept.get(name), list):
            kept[name] = kept[name][0]
    return SailViTConfig(**kept | {"any_resolution": any_resolution})


_VISION_FIELDS = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size"),
    *("patch_size", "rms_norm_eps", "attention_dropout", "initializer_range"),
    *("interpolate_positions", "rope_2d", "rope_theta"),
}


def _layout(folder: Path, names: Mapping[str, Any]) -> tuple[str, bool]:
    """The prefix of the encoder's names, and whether they are transformers'."""
    for landmark, library in ((_APPLE, False), (_LIBRARY, True)):
        found = [name.removesuffix(landmark) for name in names if name.endswith(landmark)]
        if found:
            return found[0], library
    raise CheckpointError(f"{folder}: no AIMv2 encoder here: no tensor is called {_APPLE} or {_LIBRARY}")


def _sort_out(folder: Path, names: list[str], prefix: str) -> tuple[list[str], list[str]]:
    """The encoder's names, and a line per group that is left out on purpose; anything else is refused."""
    mine, groups, unknown = [], {}, []
    for name in names:
        inner = name.removeprefix(prefix) if name.startswith(prefix) else name
        known = next((start for start in _LEFT_OUT if inner.startswith(start)), None)
        if known is not None:
            groups.setdefault((_LEFT_OUT[known], name[: len(name) - len(inner)] + known), []).append(name)
        elif name.startswith(prefix):
            mine.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{folder}: {len(unknown)} tensors belong to nothing known, first {sorted(unknown)[0]}")
    return mine, [f"{what}: {len(found)} tensors {start}*" for (what, start), found in sorted(groups.items())]


def _rename(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names to ours; query, key and value become one matrix again."""
    out: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        split = re.fullmatch(r"encoder\.layers\.(\d+)\.attention\.([qkv])_proj\.(\w+)", name)
        if split:
            parts.setdefault(f"trunk.blocks.{split[1]}.attn.qkv.{split[3]}", {})[split[2]] = value
        elif name == "embeddings.position_embedding.weight":
            out["preprocessor.pos_embed"] = value
        else:
            new = next((re.sub(f"^{old}", new, name) for old, new in _FROM_LIBRARY if re.match(old, name)), name)
            out[new] = value
    for name, three in parts.items():
        if three.keys() != set("qkv"):
            raise CheckpointError(f"{folder}: {name} is incomplete: only {', '.join(sorted(three))} of q, k, v")
        out[name] = torch.cat([three[part] for part in "qkv"])
    return out


# ---- the language model and its tokenizer -------------------------------------------------------------------------


def read_lm(folder: Path) -> PreTrainedModel:
    """A Qwen3 language model, dense or sparse, in its stored dtype. Raises CheckpointError if it is not whole."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ARCHITECTURES:
        raise CheckpointError(f"{folder}: model_type is '{kind}'; supported language models: {sorted(ARCHITECTURES)}")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    refuse_pickles(folder)
    options = {"dtype": "auto", "attn_implementation": PACKED, "trust_remote_code": False}
    return load_whole(AutoModelForCausalLM, folder, **options).eval()


def read_tokenizer(folder: Path) -> tuple[Any, list[str]]:
    """The language model's tokenizer with the nine tokens of SAIL-VL2, and which of them were added."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no usable tokenizer ({error})") from error
    vocabulary = tokenizer.get_vocab()
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if token not in vocabulary:
            raise CheckpointError(f"{folder}: the tokenizer has no {token}, which the chat format needs")
    missing = [token for token in SAIL_TOKENS if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in missing], special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = None
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer, missing


def grow_vocabulary(lm: PreTrainedModel, size: int, seed: int) -> bool:
    """Make room for ``size`` tokens, in rows of a multiple of 64; False if there is room already.

    New rows are the mean of the old ones plus noise of a tenth of their deviation: a mean row scores like an average
    word, not like the likeliest one, and the noise tells the new tokens apart.
    """
    old = lm.config.vocab_size
    if size <= old:
        return False
    rows = math.ceil(size / 64) * 64
    generator = torch.Generator().manual_seed(seed)
    tied = lm.config.tie_word_embeddings
    with torch.no_grad():
        for module in [lm.get_input_embeddings()] + ([] if tied else [lm.get_output_embeddings()]):
            wide = module.weight.float()
            fresh = torch.empty(rows - old, wide.shape[1]).normal_(generator=generator)
            fresh = wide.mean(0) + 0.1 * wide.std(0) * fresh
            module.weight = nn.Parameter(torch.cat([module.weight, fresh.to(module.weight.dtype)]))
    lm.get_input_embeddings().num_embeddings = lm.get_output_embeddings().out_features = rows
    if tied:
        lm.get_output_embeddings().weight = lm.get_input_embeddings().weight
    lm.config.vocab_size = lm.vocab_size = lm.model.vocab_size = rows
    return True
