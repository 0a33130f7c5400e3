r"""What part of a reply is its answer, as the public evaluations cut it out before they score.

Thoughts must go first: their letters break every rule that looks for a letter. Two ways are in use: everything after
the last ``</think>``, and the authors' own (the adapter of SAIL-VL2 in VLMEvalKit), which looks for ``\boxed{}``.
Time is linear in the reply whatever it holds.
"""

from __future__ import annotations


def split_think(reply: str) -> tuple[str, str]:
    """(answer, thoughts): the answer is what follows the last ``</think>``, stripped; without one, the whole reply.

    Thoughts are stripped if there is exactly one block; otherwise they are everything before the answer, as it stands.
    """
    head, mark, tail = reply.rpartition("</think>")
    if not mark:
        return reply, ""
    if "</think>" not in head and "<think>" in head:
        return tail.strip(), head.split("<think>")[1].strip()
    return tail.strip(), head + mark


def boxed_answer(reply: str, *, strict: bool = False) -> str:
    r"""The first ``\boxed{}`` after the first thought, else the last ``\boxed{}`` anywhere, else the whole reply.

    Braces inside may be one level deep; a deeper box is not seen. ``strict``: any balanced depth.
    """
    thought = reply.find("<think>")
    end = reply.find("</think>", thought) if thought >= 0 else -1
    after = _boxes(reply, end + len("</think>"), deep=strict, first=True) if end >= 0 else []
    found = after or _boxes(reply, 0, deep=strict)
    return found[-1] if found else reply


def last_boxed(reply: str) -> str | None:
    r"""The content of the last balanced ``\boxed{}``, or None."""
    found = all_boxed(reply)
    return found[-1] if found else None


def all_boxed(reply: str) -> list[str]:
    r"""The contents of all balanced ``\boxed{}``, left to right; of nested ones the outer."""
    return _boxes(reply, 0, deep=True)


def _boxes(text: str, start: int, *, deep: bool, first: bool = False) -> list[str]:
    r"""Contents of the ``\boxed{}`` that do not overlap, left to right; not ``deep``: one level of braces inside."""
    ends = _closing(text, start) if deep else {}
    found: list[str] = []
    mark = "\\boxed{"
    place = text.find(mark, start)
    while place >= 0:
        begin = place + len(mark)
        end = ends.get(begin - 1, -1) if deep else _close(text, begin)
        if end >= 0:
            found.append(text[begin:end])
            if first:
                break
        place = text.find(mark, end + 1 if end >= 0 else place + 1)
    return found


def _closing(text: str, start: int) -> dict[int, int]:
    """Where each brace closes, in one pass, so that a million unclosed boxes cost no more than one."""
    opened: list[int] = []
    ends: dict[int, int] = {}
    for place in range(start, len(text)):
        if text[place] == "{":
            opened.append(place)
        elif text[place] == "}" and opened:
            ends[opened.pop()] = place
    return ends


def _close(text: str, begin: int) -> int:
    """Where the brace opened before ``begin`` closes, with at most one level inside; -1 if it does not."""
    inside = False
    for place in range(begin, len(text)):
        if text[place] == "{":
            if inside:
                return -1
            inside = True
        elif text[place] == "}":
            if not inside:
                return place
            inside = False
    return -1


def sail_answer(reply: str, name: str, *, thinking: bool = False, strict: bool = False) -> str:
    """The reply as SAIL-VL2's authors hand it to the scorer: boxed answer if it was to think, and for the sets whose
    name contains ChartQA or OCRVQA one period at the end off."""
    if thinking:
        reply = boxed_answer(reply, strict=strict)
    return reply.removesuffix(".") if "ChartQA" in name or "OCRVQA" in name else reply
