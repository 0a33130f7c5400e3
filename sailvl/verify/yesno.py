"""Does a reply say yes or no? The public rules: MME, HallusionBench and POPE by words, TempCompass by beginning."""

from __future__ import annotations

from typing import Literal

from sailvl.verify.vqa import punct

YesNo = Literal["Yes", "No", "Unknown"]


def yes_or_no(reply: str, *, strict: bool = False) -> YesNo:
    """Which of the words "yes" and "no" the reply holds; both or neither is Unknown.

    Words are what is left after the punctuation rule of visual question answering, so "a.yes b" holds neither.
    """
    words = punct(reply.lower(), every_period=strict).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def begins(reply: str) -> YesNo:
    """Yes or No if the reply begins so, case aside; "nothing" begins with no."""
    reply = reply.lower()
    if reply.startswith("yes"):
        return "Yes"
    return "No" if reply.startswith("no") else "Unknown"
