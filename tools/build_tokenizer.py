"""Train the nano tokenizer: Qwen3's rules at 8,192 ids.

    python tools/build_tokenizer.py --packages DIR

Byte-level BPE with Qwen3's NFC, split rule (every digit alone) and byte alphabet; after the trained vocabulary come
Qwen3's 26 added tokens in order and with its flags, then the 9 that SAIL-VL2 adds. So code written for the official
vocabulary works on this one, while the embedding table has 1.6 M weights at width 192 instead of 29 M.
Trained on the corpus alone, in fixed order: names and keywords of the drawings, phrases of the tasks, poems, glosses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from corpus.packages import members
from corpus.phrases import sentences, words
from corpus.text import glosses, poems
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers

from sailvl import assets

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 8192
SAIL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELD_OUT = 20
"""Every 20th poem, gloss and phrase is kept out of training, to measure on."""


def texts(folder: Path, held_out: bool) -> Iterator[tuple[str, str]]:
    """(language, text) in a fixed order; the held-out part or the rest."""
    names = [(i.name_en, i.name_zh) for i in assets.items() if i.name_zh]
    if not held_out:
        yield from words(dict(assets.CATEGORIES), repeats=400)
        for item in assets.items():
            for _ in range(4):
                yield "en", item.name_en
                yield "zh", item.name_zh or ""
            yield "en", ", ".join(item.keywords_en) + ". " + (item.description or "")
            yield "zh", "、".join(item.keywords_zh)
    streams = (
        sentences(names, dict(assets.CATEGORIES), rounds=60, seed=1),
        (("en", f"{head}: {text}") for head, text in glosses(folder)[::8]),
        (("zh", "".join(lines)) for _, lines in poems(folder)[::8]),
    )
    for stream in streams:
        for number, pair in enumerate(stream):
            if (number % HELD_OUT == 0) == held_out:
                yield pair


def build(folder: Path) -> Tokenizer:
    """The trained tokenizer with all added tokens."""
    path = "package/models/tokenizer.json"
    official = json.loads(members(folder, "qwen3-tokenizer", path.__eq__)[path])
    added = sorted(official["added_tokens"], key=lambda token: int(token["id"]))
    empty = {**official, "added_tokens": [], "model": {**official["model"], "vocab": {}, "merges": []}}
    tokenizer = Tokenizer.from_str(json.dumps(empty))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(added) - len(SAIL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in texts(folder, held_out=False)), trainer)
    for token in added:
        entry = AddedToken(
            token["content"],
            single_word=token["single_word"],
            lstrip=token["lstrip"],
            rstrip=token["rstrip"],
            normalized=token["normalized"],
            special=token["special"],
        )
        (tokenizer.add_special_tokens if token["special"] else tokenizer.add_tokens)([entry])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SAIL_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB:
        raise ValueError(f"{tokenizer.get_vocab_size()} ids, expected {VOCAB}: too little text or a doubled token")
    return tokenizer


def config() -> dict[str, object]:
    """``tokenizer_config.json``: what a Qwen3 folder says, with this project's ChatML (no newline between turns)."""
    return {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded packages")
    parser.add_argument("--out", type=Path, default=ROOT / "sailvl" / "assets" / "tokenizer")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build(arguments.packages)
    tokenizer.save(str(arguments.out / "tokenizer.json"), pretty=False)
    (arguments.out / "tokenizer_config.json").write_text(
        json.dumps(config(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    for lang in ("en", "zh"):
        held = [text for language, text in texts(arguments.packages, held_out=True) if language == lang]
        tokens = sum(len(tokenizer.encode(text).ids) for text in held)
        print(f"{lang}: {sum(map(len, held)) / tokens:.2f} characters per token on {len(held)} held-out texts")


if __name__ == "__main__":
    main()
