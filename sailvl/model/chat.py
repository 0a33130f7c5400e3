"""The chat format: special tokens, the template, and the escape of user text.

ChatML without newlines after ``<|im_end|>``; a picture is ``<img>``, its image tokens, ``</img>`` and a newline.
Several still pictures are labelled ``Image-1: `` and so on through the conversation, video frames always ``Frame-1: ``
(published processor; the technical report arXiv 2509.14033 gives no format). The template writes one
``<IMG_CONTEXT>`` per picture; the processor expands it.

Escaping is textual: a zero-width space after the first character. Tokenizers then see ordinary characters, and so does
a server that decodes a prompt and encodes it again, which would undo an escape made on token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"

GROUNDING_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")

OFFICIAL_SYSTEM = "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
"""System message of the released chat models; benchmark parity needs it."""

_STRUCTURE = r"<\|[^<>|\s]+\|>|</?img>|<IMG_CONTEXT>"
_STRUCTURE_RE = re.compile(_STRUCTURE)
_SPECIAL_RE = re.compile(_STRUCTURE + "|</?quad>|</?ref>|</?box>")
_ZERO_WIDTH_SPACE = "\u200b"


def escape(text: str, *, keep_grounding: bool = False) -> str:
    """``text`` with every special-token string neutralised; looks the same, encodes to ordinary tokens.

    ``keep_grounding`` leaves ``<ref>``, ``<box>`` and ``<quad>`` tags alone, which answers legitimately hold.
    ``<think>`` tags are not special tokens and stay: the thinking prompt names them. Idempotent.
    """
    pattern = _STRUCTURE_RE if keep_grounding else _SPECIAL_RE
    return pattern.sub(lambda found: found.group()[0] + _ZERO_WIDTH_SPACE + found.group()[1:], text)


def escape_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A chat message whose texts are escaped (an assistant's grounding tags stay); other keys are kept."""
    keep = message.get("role") == "assistant"
    content = message.get("content")
    if isinstance(content, str):
        content = escape(content, keep_grounding=keep)
    elif isinstance(content, (list, tuple)):
        content = [
            {**part, "text": escape(part["text"], keep_grounding=keep)} if isinstance(part.get("text"), str) else part
            for part in content
        ]
    return {**message, "content": content}


_TEMPLATE = """\
{%- set default_system = system_message if system_message is defined else SYSTEM_MESSAGE -%}
{%- set ns = namespace(stills=0, still=0, frame=0) -%}
{%- for message in messages if message.content is not string and message.content is iterable -%}
  {%- for part in message.content if part.type in ('image', 'image_url') and not part.frame -%}
    {%- set ns.stills = ns.stills + 1 -%}
  {%- endfor -%}
{%- endfor -%}
{%- if default_system and messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\n' + default_system + '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- elif message.content -%}
    {%- for part in message.content -%}
      {%- if part.type in ('image', 'image_url') -%}
        {%- if part.frame -%}
          {%- set ns.frame = ns.frame + 1 -%}
          {{- 'Frame-' ~ ns.frame ~ ': ' -}}
        {%- elif ns.stills > 1 -%}
          {%- set ns.still = ns.still + 1 -%}
          {{- 'Image-' ~ ns.still ~ ': ' -}}
        {%- endif -%}
        {{- '<IMG_CONTEXT>\\n' -}}
      {%- elif part.text is defined -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def chat_template_for(system_message: str) -> str:
    """The Jinja template with ``system_message`` as its default ("" = none), so that servers need nothing else."""
    return _TEMPLATE.replace("SYSTEM_MESSAGE", json.dumps(system_message, ensure_ascii=False))


def unusable(template: Any, tokenizer: Any) -> str:
    """Why a checkpoint's own chat template cannot be used, or "" if it can."""
    if template is None:
        return "is missing"
    if not isinstance(template, str):
        return "is not a single text"
    vocabulary = tokenizer.get_vocab()
    unknown = sorted({token for token in re.findall(r"<\|[^<>|\s]+\|>", template) if token not in vocabulary})
    if unknown:
        return f"uses tokens that are not in the vocabulary ({', '.join(unknown)})"
    if IMAGE_TOKEN not in template and "<image>" not in template:
        return "writes no image placeholder"
    return ""
