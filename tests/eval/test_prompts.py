"""Prompts are the authors' to the letter: the expected texts are facts recorded from their evaluation adapter
(VLMEvalKit, Apache-2.0, ``vlmeval/vlm/sail_vl.py``)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.eval.prompts import THINKING, arrange_video, build, image_policy, max_tiles, message_text, question_text

PAIR = {"question": "What is shown?", "A": "cat", "B": "dog"}
HINT = {"question": "What is shown?", "hint": "Look left.", "A": "cat", "B": "dog", "C": "3"}
ZH = {"question": "图中是什么？", "A": "猫", "B": "狗"}
PLAIN = {"question": "What is 1+1?"}
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("name", "kind", "row", "text"),
    [
        ("MME", "Y/N", PAIR, f"What is shown? {SHORT}"),
        ("HallusionBench", "Y/N", PAIR, f"What is shown? Please answer yes or no. {SHORT}"),
        ("POPE", "Y/N", ZH, "图中是什么？"),
        ("MMMU_DEV_VAL", "MCQ", HINT, f"Look left.\nWhat is shown?\nA. cat\nB. dog\nC. 3\n{LETTER}"),
        ("BLINK", "MCQ", ZH, "图中是什么？\nA. 猫\nB. 狗\n请直接回答选项字母。"),
        ("MMBench_DEV_EN_V11", "MCQ", {"question": "图中有几只猫？"}, "图中有几只猫？\n请直接回答问题。"),
        ("WeMath", "MCQ", PAIR | {"A": "猫"}, "What is shown?\nA. 猫\nB. dog\n请直接回答选项字母。"),
        ("RealWorldQA", "MCQ", PLAIN, "What is 1+1?\nAnswer the question directly."),
        ("MMStar", "MCQ", PAIR | {"B": None}, f"What is shown?\nA. cat\n{LETTER}"),
        ("DocVQA_VAL", "VQA", ZH, f"图中是什么？\n{SHORT}"),
        ("OCRBench_v2", "VQA", PLAIN, f"What is 1+1?\n{SHORT}"),
        ("LogicVista", "VQA", PLAIN, f"What is 1+1?\n{SHORT}"),
        ("MM-IFEval", "VQA", PLAIN, f"What is 1+1?\n{SHORT}"),
        ("MathVision", "VQA", PLAIN, "What is 1+1?"),
        ("CRPE_RELATION", "VQA", PLAIN, "What is 1+1?"),
        ("LLaVABench", "VQA", PLAIN, "What is 1+1?\nAnswer this question in detail."),
        ("OlympiadBench", "VQA_ex_prompt", HINT, "What is shown?"),
        ("RefCOCO", "GROUNDING", PLAIN, "What is 1+1?"),
    ],
)
def test_wording(name, kind, row, text):
    assert question_text(name, kind, row) == text
    assert build(name, kind, row, 1) == f"<image>\n{text}"


def test_several_pictures_are_labelled_and_never_interleaved():
    row = {"question": "Compare <image 1> and <image 2>."}
    assert build("MMVet", "VQA", row, 2) == "Image-1: <image>\nImage-2: <image>\nCompare <image 1> and <image 2>."
    assert build("MMVet", "VQA", row, 0) == "Compare <image 1> and <image 2>."


def test_muirbench_numbers_its_pictures_in_the_text():
    row = {"question": "See <image> then <image>: <image> <image>", "A": "x"}
    text = build("MUIRBench", "MCQ", row, 2)
    assert text.startswith("Image-1: <image>\nImage-2: <image>\nSee <Image-1> then <Image-2>: \nA. x\n")
    assert build("MUIRBench", "MCQ", PLAIN, 1).startswith("Image-1: <image>\nWhat")


def test_endings_of_video_sets():
    text = "Q\nA. x\nAnswer:"
    assert arrange_video("Video-MME", text, 2) == f"Frame-1: <image>\nFrame-2: <image>\nQ\nA. x\n{LETTER}"
    assert arrange_video("MMBench-Video", text, 2).endswith("Q\nA. x")
    assert arrange_video("TempCompass_MCQ", text, 12).count("Frame-") == 12
    row = {"question": "What?", "candidates": "['A. x', 'B. y']"}
    assert question_text("TempCompass_MCQ", "Video-MCQ", row).endswith(
        "A. x\nB. y\nPlease directly give the best option:"
    )
    row = {"question": "What?", "candidates": "['x', 'y']"}
    assert build("MVBench", "Video-MCQ", row, 2).endswith("Options:\n(A) x\n(B) y\nOnly give the best option.")
    assert question_text("LongVideoBench", "Video-MCQ", row) == f"What?\nA. x\nB. y\n{LETTER}"


def test_thinking_is_asked_for_on_a_line_of_its_own():
    assert build("MathVision", "VQA", PLAIN, 1, thinking=True) == f"<image>\nWhat is 1+1?\n{THINKING}"


@pytest.mark.parametrize(
    ("name", "kind", "tiles"),
    [
        ("MME", "Y/N", 10),
        ("ChartQA_TEST", "VQA", 12),
        ("DocVQA_TEST", "VQA", 18),
        ("OCRBench", "VQA", 24),
        ("MME-RealWorld-CN", "MCQ", 12),
        ("HRBench8K", "MCQ", 24),
        ("Video-MME", "Video-MCQ", 1),
    ],
)
def test_tile_limits(name, kind, tiles):
    assert max_tiles(name, kind) == tiles


def test_two_grids_and_doubling():
    assert image_policy("MMMU_DEV_VAL", "MCQ").upscale == 2 and image_policy("MMMU_DEV_VAL", "MCQ").msac
    assert not image_policy("MMStar", "MCQ", msac=False).msac
    assert not image_policy("Video-MME", "Video-MCQ").msac


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("MME", "Y/N", 1), ("MMVet", "VQA", 3), ("MVBench", "Video-MCQ", 4)]
)
@given(question=st.text(st.sampled_from(list("ab<>image/-:1 \n")), max_size=30))
def test_a_message_holds_one_placeholder_a_picture_whatever_the_question_says(name, kind, count, question):
    text = message_text(build(name, kind, {"question": question + "<image>"}, count), count)
    assert text.count("<image>") == count
    assert "Image-1: <image>" not in text and "Frame-1: <image>" not in text
