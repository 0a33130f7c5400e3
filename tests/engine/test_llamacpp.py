"""The llama.cpp engine: its glue with a double of the library's rows, against ``Local``; the library if installed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sailvl.engine.base import EngineError, Request, Sampling, replies
from sailvl.engine.llamacpp import LlamaCpp, LlamaRows
from sailvl.engine.local import Local
from sailvl.model.gguf_export import export_gguf
from sailvl.types import Message, Picture, Record, RecordError


class Rows:
    """What ``LlamaRows`` does, by recomputing every row with torch: nothing of keys and values can go wrong."""

    def __init__(self, model: Any, capacity: int, context: int) -> None:
        text = model.config.text_config
        self.vocabulary, self.width, self.capacity, self.context = text.vocab_size, text.hidden_size, capacity, context
        self.lm, self.head = model.model.language_model, model.lm_head
        self.embeds, self.prompts = list[torch.Tensor](), list[torch.Tensor]()
        self.most = self.closed = 0

    def read(self, ids: Sequence[int], image_tokens: torch.Tensor | None, placeholder: int) -> torch.Tensor:
        embeds = self.lm.embed_tokens(torch.tensor(ids)).clone()
        where = torch.tensor(ids) == placeholder
        assert int(where.sum()) == (0 if image_tokens is None else len(image_tokens))
        if image_tokens is not None:
            embeds[where] = image_tokens
        self.embeds.append(embeds)
        self.prompts.append(embeds)
        return self.logits(-1)

    def extend(self, ids: Sequence[int]) -> torch.Tensor:
        assert len(ids) == len(self.embeds)
        new = self.lm.embed_tokens(torch.tensor(ids))
        self.embeds = [torch.cat([row, last[None]]) for row, last in zip(self.embeds, new, strict=True)]
        return torch.stack([self.logits(row) for row in range(len(ids))])

    def logits(self, row: int) -> torch.Tensor:
        assert len(self.embeds) <= self.capacity
        prompts = {id(prompt): len(prompt) for prompt in self.prompts}  # answers to one prompt share it
        said = sum(len(row) - len(prompt) for row, prompt in zip(self.embeds, self.prompts, strict=True))
        self.most = max(self.most, sum(prompts.values()) + said)
        assert self.most <= self.context
        return self.head(self.lm(inputs_embeds=self.embeds[row][None], use_cache=False).last_hidden_state[0, -1])

    def repeat(self, row: int, times: int) -> None:
        self.embeds += [self.embeds[row]] * times
        self.prompts += [self.prompts[row]] * times

    def drop(self, row: int) -> None:
        for values in (self.embeds, self.prompts):
            last = values.pop()
            if row < len(values):
                values[row] = last

    def clear(self) -> None:
        self.embeds, self.prompts = [], []

    def close(self) -> None:
        self.closed += 1


def picture(seed: int) -> Image.Image:
    size = [(56, 56), (130, 60), (50, 120)][seed % 3]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def request(index: int, **sampling: Any) -> Request:
    images = [picture(index + k) for k in range(index % 3)]
    text = "<image>" * len(images) + ["what is in the picture?", "how many?", "a red square and a circle"][index % 3]
    pictures = tuple(Picture(width=image.width, height=image.height, ref=None) for image in images)
    record = Record(id=f"r{index}", messages=(Message(role="user", text=text),), pictures=pictures)
    return Request(id=f"{index}", record=record, images=images, sampling=Sampling(**{"max_new_tokens": 6, **sampling}))


def answers(engine: Any, requests: Sequence[Request]) -> dict[str, Any]:
    return {
        reply.id: (reply.error, [(answer.text, answer.ids) for answer in reply.completions])
        for reply in replies(engine, requests)
    }


def requests() -> Iterator[Request]:
    for index in range(7):
        more = {"temperature": 1.0, "seed": index, "n": 2} if index % 2 else {}
        yield request(index, max_new_tokens=3 + index, **more)


@pytest.fixture
def model(tiny_model: Any) -> Any:
    model = copy.deepcopy(tiny_model).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name:
                value.normal_(0, 0.15)
    return model


def test_answers_are_those_of_local(model: Any, tiny_processor: Any) -> None:
    """Pictures, several answers, sampling, rows that leave and join; the context is never exceeded."""
    expected = answers(Local(copy.deepcopy(model), tiny_processor), list(requests()))
    for capacity, context in ((8, 4096), (3, 120), (2, 90)):
        double = copy.deepcopy(model)
        rows = Rows(double, capacity, context)
        engine = LlamaCpp(double, tiny_processor, rows)
        found = answers(engine, list(requests()))
        assert found == expected and not rows.embeds and not any(error for error, _ in found.values())
        assert "language_model" not in "".join(name for name, _ in double.named_parameters())
        engine.close()
        assert rows.closed == 1
    assert len({text for _, texts in expected.values() for text in texts}) > 4


def test_what_does_not_fit(model: Any, tiny_processor: Any) -> None:
    engine = LlamaCpp(model, tiny_processor, Rows(model, 4, 100))
    with pytest.raises(RecordError, match=r"r0: .* exceed the model's 100"):
        engine.submit(request(0, max_new_tokens=90))
    with pytest.raises(RecordError, match=r"r0: prompt and answers may take .* the context holds 100"):
        engine.submit(request(0, max_new_tokens=30, n=4))
    assert engine.step() == []
    engine.submit(request(0))
    engine.cancel("0")
    assert [delta.finish_reason for delta in engine.step()] == ["cancelled"]


def test_a_file_of_another_model(model: Any, tiny_processor: Any) -> None:
    rows = Rows(model, 4, 100)
    rows.vocabulary += 64
    with pytest.raises(ValueError, match="they belong to different models"):
        LlamaCpp(model, tiny_processor, rows)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(EngineError, match="pip install llama-cpp-python"):
        LlamaRows(Path("x.gguf"))


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "sparse"])
def test_with_the_library(model: Any, tiny_processor: Any, tmp_path: Path, moe: bool) -> None:
    pytest.importorskip("llama_cpp")
    if moe:
        from sailvl.model import checkpoint

        lm = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "initializer_range": 0.15}
        vit = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = checkpoint.config_for("nano-moe", processor=tiny_processor, lm=lm, vit=vit)
        model = checkpoint.build(config, seed=1).eval()
    export_gguf(model, tiny_processor, tmp_path / "lm.gguf", kind="f16")
    asked = [request(index, max_new_tokens=4 + index, n=1 + index % 2, top_logprobs=0) for index in range(6)]
    expected = {reply.id: reply for reply in replies(Local(copy.deepcopy(model), tiny_processor), asked)}
    rows = LlamaRows(tmp_path / "lm.gguf", capacity=3, context=256, threads=1)
    engine = LlamaCpp(copy.deepcopy(model), tiny_processor, rows)
    found = list(replies(engine, asked))
    for reply in found:
        for ours, theirs in zip(reply.completions, expected[reply.id].completions, strict=True):
            # The first tokens see the whole prompt, pictures included; later ones may part at a tie.
            assert ours.ids[0] == theirs.ids[0]
            assert ours.logprobs[0] == pytest.approx(theirs.logprobs[0], abs=0.05)
    same = [reply for reply in found if reply.completions == expected[reply.id].completions or _close(reply, expected)]
    assert len(found) == 6 and len(same) >= 5
    engine.close()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(EngineError, match="cannot read this file"):
        LlamaRows(tmp_path / "broken.gguf")


def _close(reply: Any, expected: dict[str, Any]) -> bool:
    return [answer.ids for answer in reply.completions] == [answer.ids for answer in expected[reply.id].completions]
