"""Is this answer right? One scorer for evaluation, rewards and filters, without torch.

A verifier is a function of an answer and the truth with a score in [0, 1]; ``score`` picks the one a question names
and hands it the part of the reply that counts as the answer.
"""

from __future__ import annotations

from sailvl.types import Question
from sailvl.verify.choice import choice
from sailvl.verify.grounding import iou
from sailvl.verify.text import edit, exact, final_answer, number

__all__ = ["choice", "edit", "exact", "final_answer", "iou", "number", "score"]

_BY_NAME = {"exact": exact, "number": number, "iou": iou, "edit": edit}


def score(question: Question, reply: str) -> float:
    """Score of a whole reply, thoughts and all, in [0, 1].

    A choice question lists what it offers in ``record.meta["options"]``. Raises ValueError if the truth is malformed.
    """
    answer = final_answer(reply)
    if question.verifier == "choice":
        return choice(answer, question.truth, question.record.meta.get("options", ()))
    return _BY_NAME[question.verifier](answer, question.truth)
