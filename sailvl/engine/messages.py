"""A record as chat messages: every picture a part of a user turn, in place of its placeholder.

The same reading as ``data.encode``: pictures that no text names come before the first user text, and a line end behind
a placeholder belongs to it. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sailvl.types import IMAGE_PLACEHOLDER, Record, RecordError

_PLACEHOLDER = re.compile(re.escape(IMAGE_PLACEHOLDER) + "\n?")


def chat_messages(record: Record, part: Callable[[int], dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """The conversation in the form chat servers and chat templates read; ``part(i)`` stands for picture i.

    Raises RecordError if the record does not end with a user turn, if a system turn is not the first, or if the record,
    its placeholders and the ``num_images`` decoded pictures differ in number.
    """
    roles = [message.role for message in record.messages]
    if not roles or roles[-1] != "user":
        ending = f"ends with {roles[-1]}" if roles else "is empty"
        raise RecordError(f"record {record.id}: a prompt must end with a user turn, this one {ending}")
    if "system" in roles[1:]:
        raise RecordError(
            f"record {record.id}: the system message must come first, not as message {roles.index('system', 1) + 1}"
        )
    if num_images != len(record.pictures):
        raise RecordError(f"record {record.id}: {len(record.pictures)} pictures, {num_images} images given")
    users = [message.text for message in record.messages if message.role == "user"]
    named = sum(text.count(IMAGE_PLACEHOLDER) for text in users)
    if named not in (0, num_images):
        raise RecordError(f"record {record.id}: {named} placeholders, {num_images} pictures")
    pictures = iter(range(num_images))
    messages: list[dict[str, Any]] = []
    for message in record.messages:
        content: Any = message.text
        if message.role == "user" and num_images:
            before, *behind = _PLACEHOLDER.split(message.text)
            content = [] if named else [part(index) for index in pictures]
            content.append({"type": "text", "text": before})
            for text in behind:
                content += [part(next(pictures)), {"type": "text", "text": text}]
            content = [piece for piece in content if piece.get("text") != ""] or ""
        messages.append({"role": message.role, "content": content})
    return messages
