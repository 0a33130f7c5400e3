"""What a model is asked: the wording and picture limits with which the authors of SAIL-VL2 evaluate.

A small change of wording moves a score by points, so these strings are facts to reproduce, not prose to improve. They
are those of the authors' adapter in the VLMEvalKit toolkit (``vlmeval/vlm/sail_vl.py``); rules there go by substrings
of the data set's name, upper and lower case told apart, and so do they here: a data set of a user's own takes the
wording of the set it is named after, or the plain one.

No torch; nothing is decoded here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from sailvl.eval.table import as_list
from sailvl.geometry import ImagePolicy

THINKING = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)
"""Appended to the question on a new line when the model is to think first (technical report, section 4)."""

SHORT = "Answer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

_DETAILED = ("LLaVABench", "WildVision")
_SHORT = (
    *("OCRVQA", "TextVQA", "ChartQA", "DocVQA", "InfoVQA", "OCRBench", "DUDE", "SLIDEVQA", "GQA", "MMLongBench_DOC"),
)
_BARE = (
    *("MathVista", "MathVision", "MathVerse", "VCR", "MMVet", "MTVQA", "CRPE", "MIA-Bench", "MM-Math", "DynaMath"),
    "QSpatial",
)
_OWN_TEXT = ("MMDU", "MME-RealWorld", "ChartQAPro", "ChartMuseum")
_TILES = (
    (12, ("ChartQA_TEST", "MMMU_DEV_VAL", "MMMU_TEST", "MME-RealWorld", "VCR_EN", "VCR_ZH", "OCRVQA")),
    (18, ("DocVQA_VAL", "DocVQA_TEST", "DUDE", "MMLongBench_DOC", "SLIDEVQA")),
    (24, ("InfoVQA_VAL", "InfoVQA_TEST", "OCRBench", "HRBench4K", "HRBench8K")),
)
_REAL_WORLD = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter (A, "
    "B, C, D, or E) of the correct option. \nThe best answer is:"
)
_REAL_WORLD_CN = "根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为："
_VIDEO_MME = (
    "\nThese are the frames of a video. Select the best answer to the following multiple-choice question based on the "
    "video. Respond with only the letter (A, B, C, or D) of the correct option.\n"
)
_MVBENCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)
_BEST_OPTION = "\nPlease directly give the best option:"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_LABELLED = re.compile(r"(?:Image|Frame)-[0-9]+: <image>")
MAX_FRAMES = 64


def _named(names: tuple[str, ...], name: str) -> bool:
    return any(part in name for part in names)


def is_video(kind: str) -> bool:
    """Whether questions of this kind (``MCQ``, ``VQA``, ``Y/N``, ``Video-MCQ`` and so on) come with a clip."""
    return kind.startswith("Video")


def max_tiles(name: str, kind: str) -> int:
    """Tiles a picture of this data set may be cut into, the thumbnail apart."""
    if is_video(kind):
        return 1
    return next((limit for limit, names in _TILES if _named(names, name)), 10)


def image_policy(name: str, kind: str, *, msac: bool = True) -> ImagePolicy:
    """How the pictures of a prompt are cut: SAIL-VL2 is evaluated with two grids for prompts of one picture.

    The first picture of MMMU is enlarged to twice its sides.
    """
    upscale = 2.0 if "MMMU" in name and not is_video(kind) else 1.0
    return ImagePolicy(max_tiles=max_tiles(name, kind), msac=msac and not is_video(kind), upscale=upscale)


def has_own_text(name: str, kind: str) -> bool:
    """Whether the data set brings its full prompt, so that nothing is added to it."""
    return is_video(kind) or _named(_OWN_TEXT, name)


def question_text(name: str, kind: str, row: Mapping[str, Any]) -> str:
    """The question with the data set's instruction, pictures apart.

    ``row``: the columns of a sample; missing and None cells are absent.
    """
    question = str(row["question"])
    if is_video(kind):
        return _about_clip(name, question, row)
    if "MME-RealWorld" in name:
        listed = row.get("multi-choice options") or _listed(name, row)
        return f"{question} {listed}\n{_REAL_WORLD_CN if 'CN' in name else _REAL_WORLD}"
    if has_own_text(name, kind):
        return _with_options(question, row)[0]
    if kind == "Y/N":
        if "MME" in name:
            return f"{question} {SHORT}"
        return f"{question} Please answer yes or no. {SHORT}" if _named(("HallusionBench", "AMBER"), name) else question
    if kind == "MCQ":
        return _multiple_choice(question, row)
    if kind == "VQA":
        if _named(_DETAILED, name):
            return f"{question}\nAnswer this question in detail."
        bare = _named(_BARE, name) and not _named(_SHORT, name)
        return question if bare else f"{question}\n{SHORT}"
    return question


def _listed(name: str, row: Mapping[str, Any]) -> str:
    head = "选项如下所示:" if "CN" in name else "The choices are listed below:"
    return "\n".join([head, *(f"({letter}) {text}" for letter, text in options(row).items())])


def _about_clip(name: str, question: str, row: Mapping[str, Any]) -> str:
    """The text of the video sets, as the toolkit joins it; sets it does not know ask like LongVideoBench."""
    candidates = as_list(str(row["candidates"])) if row.get("candidates") is not None else []
    if "Video-MME" in name:
        return f"{_VIDEO_MME}Question: {question}\n" + "\n".join(candidates) + "\nAnswer: "
    if "TempCompass" in name:
        ending = {"TempCompass_MCQ": _BEST_OPTION, "TempCompass_YorN": "\nPlease answer yes or no:"}
        return "\n".join([question, *candidates]) + next((end for key, end in ending.items() if key in name), "")
    if "MVBench" in name:
        listed = "".join(f"\n({letter}) {text}" for letter, text in zip(ascii_uppercase, candidates, strict=False))
        return f"{_MVBENCH}Question: {question}\nOptions:{listed}\nOnly give the best option.Best option:("
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(ascii_uppercase, candidates, strict=False))
    return question + listed + (LETTER if candidates else "")


def options(row: Mapping[str, Any]) -> dict[str, str]:
    """The options of a multiple-choice sample, by letter; empty cells are absent."""
    return {letter: str(row[letter]) for letter in ascii_uppercase if row.get(letter) is not None}


def _with_options(question: str, row: Mapping[str, Any]) -> tuple[str, bool]:
    """Hint, question and one option a line; and whether there are options."""
    if row.get("hint") is not None:
        question = f"{row['hint']}\n{question}"
    found = options(row)
    return "".join([question, *(f"\n{letter}. {text}" for letter, text in found.items())]), bool(found)


def _multiple_choice(question: str, row: Mapping[str, Any]) -> str:
    text, has_options = _with_options(question, row)
    if _CHINESE.search(text):
        return text + ("\n请直接回答选项字母。" if has_options else "\n请直接回答问题。")
    return text + (LETTER if has_options else "\nAnswer the question directly.")


def arrange(name: str, text: str, num_images: int) -> str:
    """Pictures before the text: one bare, several labelled and never interleaved."""
    if num_images == 0:
        return text
    head = "".join(f"Image-{i + 1}: <image>\n" for i in range(num_images))
    if "MUIRBench" in name:
        text = text.replace(" ".join(["<image>"] * num_images), "")
        for i in range(num_images):
            text = text.replace("<image>", f"<Image-{i + 1}>", 1)
        return head + text
    if num_images == 1:
        return f"<image>\n{text}"
    return head + text.replace("".join(f"<Image-{i + 1}>" for i in range(num_images)), "")


def arrange_video(name: str, text: str, num_frames: int) -> str:
    """Frames before the text, and the endings that some sets lose or gain."""
    prompt = arrange(name, text, num_frames) if num_frames != 1 else f"Image-1: <image>\n{text}"
    for i in range(MAX_FRAMES):
        prompt = prompt.replace(f"Image-{i + 1}", f"Frame-{i + 1}")
    if "MMBench-Video" in name:
        return prompt.replace("\nAnswer:", "")
    if "Video-MME" in name:
        return prompt.replace("\nAnswer:", "") + LETTER
    return prompt.replace("Best option:(", "") if "MVBench" in name else prompt


def build(name: str, kind: str, row: Mapping[str, Any], num_images: int, *, thinking: bool = False) -> str:
    """The whole user turn, ``<image>`` where a picture goes: what the authors' adapter asks, before the chat template.

    ``name``: the data set's, as its file is called. ``num_images``: pictures, or frames of the clip.
    """
    text = question_text(name, kind, row)
    prompt = arrange_video(name, text, num_images) if is_video(kind) else arrange(name, text, num_images)
    return f"{prompt}\n{THINKING}" if thinking else prompt


def message_text(prompt: str, num_images: int) -> str:
    """The prompt as a record's message: labels that the chat template writes itself are left to it.

    The template numbers several pictures, and frames always. A placeholder beyond the pictures is the question's own
    text, and is made unreadable as one.
    """
    keep_label = num_images == 1 and not prompt.startswith("Frame-1: ")
    text = prompt if keep_label else _LABELLED.sub("<image>", prompt, count=num_images)
    before, *behind = text.split("<image>")
    placed = "<image>".join([before, *behind[:num_images]])
    return "<\u200bimage>".join([placed, *behind[num_images:]])
