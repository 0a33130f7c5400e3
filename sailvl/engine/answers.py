"""What the local engine has in hand: prompts that wait, answers that grow, and the tokens an answer may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sailvl.engine.base import Delta, Request
from sailvl.engine.features import View
from sailvl.engine.sampling import Choice, Chooser
from sailvl.engine.text import Detokenizer
from sailvl.model.chat import GROUNDING_TOKENS, IMAGE_END, IMAGE_START, IMAGE_TOKEN
from sailvl.model.processing import SailVLProcessor


def sayable(processor: SailVLProcessor, size: int, eos_ids: int | list[int] | None) -> tuple[set[int], list[int]]:
    """(token ids that end an answer, sorted ids that are never said) of a vocabulary of ``size``."""
    tokenizer = processor.tokenizer
    ends = [*(eos_ids if isinstance(eos_ids, list) else [eos_ids])]
    ends += tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    end_ids = {token for token in ends if token is not None}
    # The tokenizer's own list of specials holds only those with a role; every token marked special counts here, the
    # image tokens whatever their mark, and rows of the embedding that no token uses: a fresh model would say them.
    banned = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    banned |= {*tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_TOKEN, IMAGE_END, "<|im_start|>"])}
    banned |= set(range(len(tokenizer), size))
    banned -= {*tokenizer.convert_tokens_to_ids(list(GROUNDING_TOKENS)), *end_ids}
    return end_ids, sorted(token for token in banned if token < size)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request that waits: its tokens, and its pictures as they will be seen."""

    request: Request
    ids: list[int]
    views: list[View]


class Answer:
    """One answer in flight."""

    def __init__(self, prompt: Prompt, index: int, decode: Callable[[list[int]], str]) -> None:
        self.request, self.index = prompt.request, index
        self.chooser = Chooser(prompt.request.sampling, index, prompt.ids)
        self.last = -1
        self._prompt_tokens, self._count = len(prompt.ids), 0
        self._text = Detokenizer(decode, prompt.request.sampling.stop)

    def take(self, choice: Choice, end_ids: set[int]) -> Delta:
        """Add a token; an end token counts among the ids and adds no text."""
        sampling = self.request.sampling
        self.last = choice.id
        self._count += 1
        reason: Literal["stop", "length"] | None = None
        if choice.id in end_ids:
            text, reason = self._text.finish(), "stop"
        else:
            text = self._text.add(choice.id)
            if not self._text.stopped and self._count == sampling.max_new_tokens:
                text, reason = text + self._text.finish(), "length"
            if self._text.stopped:
                reason = "stop"
        return Delta(
            id=self.request.id,
            index=self.index,
            text=text,
            ids=(choice.id,),
            logprobs=() if choice.logprob is None else (choice.logprob,),
            top_logprobs=() if choice.logprob is None else (choice.top,),
            finish_reason=reason,
            num_prompt_tokens=None if reason is None else self._prompt_tokens,
        )

    def end(self, reason: Literal["cancelled"]) -> Delta:
        """The last delta of an answer that is ended from outside, with the text that was held back."""
        return Delta(
            id=self.request.id,
            index=self.index,
            text=self._text.finish(),
            finish_reason=reason,
            num_prompt_tokens=self._prompt_tokens,
        )
