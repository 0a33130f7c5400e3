"""What the judge is asked. Our own wording; a change of it changes scores, so it has a version that reports print."""

from __future__ import annotations

from collections.abc import Mapping

VERSION = "1"
"""Rises with every change of a prompt here; part of a cache's key."""


def _listed(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def option(question: str, options: Mapping[str, str], reply: str) -> str:
    """Which option does the reply take? One letter, Z for none."""
    return (
        "A multiple-choice question was answered in free words. Decide which option the answer takes. Do not answer "
        "the question yourself, and do not decide whether the answer is right.\n"
        "Reply with one option letter and nothing else. If the answer takes none of the options, or several, reply "
        f"Z.\n\nQuestion:\n{question}\n\nOptions:\n{_listed(options)}\n\nAnswer:\n{reply}\n\nLetter:"
    )


def yes_or_no(question: str, reply: str) -> str:
    """Does the reply mean yes or no? One word."""
    return (
        "A yes/no question was answered in free words. Decide what the answer means. Do not answer the question "
        "yourself.\nReply with one word: Yes, No, or Unknown if it means neither.\n\n"
        f"Question:\n{question}\n\nAnswer:\n{reply}\n\nWord:"
    )


def extract(question: str, reply: str) -> str:
    """The final answer alone, as the question wants it written."""
    return (
        "Copy the final answer out of a solution. Write it the way the question asks for it (a whole number, a decimal "
        "number, a list such as [3, 5], an expression, or an option letter), without units, words or explanation. Do "
        "not solve the problem and do not correct mistakes. If the solution gives no answer, reply with an empty "
        f"line.\n\nQuestion:\n{question}\n\nSolution:\n{reply}\n\nFinal answer:"
    )


def same(question: str, truth: str, reply: str) -> str:
    """Do two answers agree? 1 or 0."""
    return (
        "Two answers to one problem are given. Decide whether they agree: equal values count as equal however they are "
        "written, and a missing unit does not matter.\nReply with 1 if they agree and 0 if not, and nothing else.\n\n"
        f"Problem:\n{question}\n\nReference answer:\n{truth}\n\nAnswer to check:\n{reply}\n\n1 or 0:"
    )


def letters(question: str, reply: str) -> str:
    """All option letters a reply takes, in capitals, Z for none."""
    return (
        "A question with lettered options was answered in free words; several options may be right. Name the letters "
        "that the answer takes. Do not answer the question yourself.\nReply with capital letters only, without spaces "
        f"(for example AC). If it takes none, reply Z.\n\nQuestion:\n{question}\n\nAnswer:\n{reply}\n\nLetters:"
    )


def short(kind: str, reply: str) -> str:
    """A free answer brought into the form of its kind ("float", "multiple choice", or text)."""
    form = {
        "float": "a decimal number with three digits after the point",
        "multiple choice": "one option letter, such as A",
    }.get(kind, "a few words; numbers with three digits after the point")
    return (
        f"Copy the final answer out of a text and write it as {form}. Do not correct it. Reply with the answer alone, "
        f"on one line.\n\nText:\n{reply}\n\nAnswer:"
    )


def grade(question: str, truth: str, reply: str) -> str:
    """How right is a free answer? A number from 0.0 to 1.0."""
    return (
        "Grade an answer to a question about a picture that you cannot see, by comparing it with the reference. In the "
        "reference, <AND> joins parts that are all needed and <OR> joins alternatives that are each enough. Further "
        "statements that do not contradict the reference cost nothing.\n"
        "Reply with one number from 0.0 (nothing right) to 1.0 (all right), with one digit after the point, and "
        f"nothing else.\n\nQuestion:\n{question}\n\nReference:\n{truth}\n\nAnswer:\n{reply}\n\nGrade:"
    )


def correct(kind: str, question: str, truth: str, reply: str) -> str:
    """Is a prediction right? "Correct" or "Incorrect". ``kind``: what kind of question it is, in words."""
    return (
        f"Decide whether the prediction is a right answer to a {kind}, given the true answer.\n"
        'Reply "Correct" or "Incorrect" and nothing else.\n\n'
        f"Question:\n{question}\n\nTrue answer: {truth}\n\nPrediction: {reply}\n\nDecision:"
    )


def caption(question: str, reply: str) -> str:
    """Which option does a description of a clip support? ``Answer: B. text``, or that none does."""
    return (
        "Answer a multiple-choice question about a video from its description alone. If the description does not say "
        "enough, or supports no option, answer that none is correct.\nReply with two lines:\nReasoning: one sentence\n"
        "Answer: the letter and text of the option, for example B. running\n\n"
        f"Description:\n{reply}\n\nQuestion:\n{question}"
    )
