"""The lmms-eval plug-in, under a stand-in for that package which gives what version 0.7.3 gives."""

from __future__ import annotations

import io
import logging
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sailvl.engine.base import EngineError, Request, Sampling, replies
from sailvl.engine.fake import Fake
from sailvl.engine.local import Local
from sailvl.eval import lmms_plugin as plugin
from sailvl.eval.lmms_plugin import conversation, sampling
from sailvl.geometry import ImagePolicy
from sailvl.media import MediaError
from sailvl.types import Message, Picture, Record, RecordError
from sailvl.video import video_frames

GREEDY = {"max_new_tokens": 6, "until": ["\n\n"], "temperature": 0.0, "do_sample": False}


# ---- what lmms-eval gives -------------------------------------------------------------------------------------


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int = 0
    resps: list[Any] = field(default_factory=list)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


class Base:
    is_simple = True

    def __init__(self) -> None:
        self.hooked: list[Any] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.hooked.append(given))
        self.task_dict: dict[str, Any] = {}
        self.cleaned = False

    def clean(self) -> None:
        self.cleaned = True


@pytest.fixture
def sailvl_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The model class, found as lmms-eval finds it: by the path in the manifest."""
    tree = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, members in tree.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    plugin._model_class.cache_clear()
    manifest = plugin.manifest()
    assert (manifest.model_id, manifest.simple_class_path) == ("sailvl", None)
    module_name, class_name = manifest.chat_class_path.rsplit(".", 1)
    yield getattr(sys.modules[module_name], class_name)
    plugin._model_class.cache_clear()


def user(*parts: Any) -> list[dict[str, Any]]:
    """A user turn as lmms-eval's protocol writes it: texts, pictures, and clips as lists or paths."""
    kinds = {str: "text", Image.Image: "image"}
    content = [
        part
        if isinstance(part, dict)
        else {"type": "text", "text": part}
        if kinds.get(type(part)) == "text"
        else {"type": "video" if isinstance(part, (list, Path)) else "image", "url": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def instances(model: Any, documents: list[Any], arguments: dict[str, Any] | None = None) -> list[Instance]:
    """Requests as a chat task makes them; a document is what its messages are, or raises."""
    model.task_dict = {"task": {"test": documents}}

    def doc_to_messages(document: Any) -> Any:
        if isinstance(document, Exception):
            raise document
        return document

    given = GREEDY if arguments is None else arguments
    return [
        Instance("generate_until", (f"ctx {i}", doc_to_messages, dict(given), i, "task", "test"))
        for i in range(len(documents))
    ]


def picture(shade: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    return Image.effect_noise(size, 40).point(lambda value: (value + shade) % 256).convert("RGB")


# ---- the model ------------------------------------------------------------------------------------------------


def test_it_is_declared_where_lmms_eval_looks() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["sailvl"].partition(":")
    assert getattr(sys.modules[module], name) is plugin.manifest


def test_the_class_is_a_chat_model_of_theirs(sailvl_class: type) -> None:
    assert issubclass(sailvl_class, Base) and sailvl_class.is_simple is False
    assert f"{sailvl_class.__module__}.{sailvl_class.__qualname__}" == plugin.manifest().chat_class_path
    with pytest.raises(AttributeError, match="nothing"):
        plugin.nothing  # noqa: B018


def test_answers_are_those_of_the_engine_in_the_order_of_the_requests(
    sailvl_class: type, tiny_model: Any, tiny_processor: Any, tmp_path: Path, clips: ModuleType
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    (tmp_path / "clip.mp4").write_bytes(clips.clip())
    frames = video_frames(tmp_path / "clip.mp4", 3)
    one, two, three = picture(1), picture(50, (60, 130)), picture(99, (30, 30))
    documents = [
        user("what is it?"),
        user(one, "how many?"),
        user("first ", one, " then ", two, " which?"),
        user(tmp_path / "clip.mp4", "what happens?"),
        user([one, two, three], "a list of frames"),
        [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *user(three, "a square?")],
    ]
    model = sailvl_class(pretrained=str(tmp_path / "model"), batch_size=4, device="cpu", num_frames=3, max_tiles=2)
    results = model.generate_until(instances(model, documents))

    def record(text: str, *images: Image.Image, frame: bool = False, system: str = "") -> tuple[Record, list[Any]]:
        turns = [Message(role="system", text=system)] if system else []
        shown = tuple(Picture(width=i.width, height=i.height, ref=None, frame=frame) for i in images)
        return Record(id="r", messages=(*turns, Message(role="user", text=text)), pictures=shown), list(images)

    wanted = [
        record("what is it?"),
        record("<image>how many?", one),
        record("first <image> then <image> which?", one, two),
        record("<image><image><image>what happens?", *frames, frame=True),
        record("<image><image><image>a list of frames", one, two, three, frame=True),
        record("<image>a square?", three, system="be brief"),
    ]
    engine = Local(tiny_model, tiny_processor, capacity=1)
    policy = ImagePolicy(max_tiles=2, msac=True)
    for result, (known, images) in zip(results, wanted, strict=True):
        request = Request(
            id="0", record=known, images=images, policy=policy, sampling=Sampling(max_new_tokens=6, stop=())
        )
        (reply,) = replies(engine, [request])
        assert not reply.error and result.text == reply.completions[0].text
        assert result.token_counts == TokenCounts(reply.num_prompt_tokens, len(reply.completions[0].ids))
    assert len({result.text for result in results}) > 1 and results[3].token_counts != results[0].token_counts
    hooked = [(kind, request, text) for kind, request, text in model.hooked]
    assert [kind for kind, _, _ in hooked] == ["generate_until"] * 6 and hooked[2][1] == ("ctx 2", GREEDY)
    assert [text for _, _, text in hooked] == [result.text for result in results]


def test_samples_that_cannot_be_asked_are_empty_and_logged(sailvl_class: type, caplog: Any) -> None:
    broken = io.BytesIO(b"\x89PNG\r\n\x1a\nnothing").getvalue()
    bad = {
        "KeyError: 'no such column'": KeyError("no such column"),
        "not a picture in a known format": user({"type": "image", "url": {"bytes": broken, "path": None}}, "what?"),
        "type 'audio'": user({"type": "audio", "url": "a.wav"}),
        "only users show pictures": [{"role": "assistant", "content": user(picture(1))[0]["content"]}],
        "only whole clips": user({"type": "video", "url": {"url": "a.mp4", "video_start": 3}}),
        "nothing is fetched": user({"type": "image", "url": "https://example.org/a.jpg"}),
    }
    documents = [user("before"), *bad.values(), user("after")]
    engine = Fake(lambda request: f"said {request.record.messages[-1].text}", capacity=3)
    model = sailvl_class(engine=engine)
    with caplog.at_level(logging.WARNING):
        results = model.generate_until(instances(model, documents))
    assert [result.text for result in results] == ["said before", *[""] * len(bad), "said after"]
    assert results[1].token_counts == TokenCounts(None, 0)
    for number, reason in enumerate(bad, 1):
        assert any(f"task/test/{number}:" in line and reason in line for line in caplog.messages), reason
    assert f"{len(bad)} of {len(documents)} samples" in caplog.text


def test_an_engine_that_refuses_one_sample_answers_the_others(sailvl_class: type) -> None:
    model = sailvl_class(engine=Fake(lambda r: RecordError("too long") if r.id == "1" else ValueError("odd")))
    with pytest.raises(RuntimeError, match=r"none of 3 samples could be asked; the first: task/test/0: odd"):
        model.generate_until(instances(model, [user("a"), user("b"), user("c")]))
    model = sailvl_class(engine=Fake(lambda r: RecordError("too long") if r.id == "1" else "yes"))
    results = model.generate_until(instances(model, [user("a"), user("b"), user("c")]))
    assert [result.text for result in results] == ["yes", "", "yes"]
    model = sailvl_class(engine=Fake(lambda r: EngineError("the server is gone")))
    with pytest.raises(EngineError, match="gone"):
        model.generate_until(instances(model, [user("a")]))


def test_stop_strings_of_a_task_end_answers_and_blank_lines_do_not(sailvl_class: type) -> None:
    model = sailvl_class(engine=Fake("one\n\ntwo ASSISTANT: three"))
    documents = [user("?")]
    for until, text in (
        (["\n\n"], "one\n\ntwo ASSISTANT: three"),
        (["\n\n", "ASSISTANT:"], "one\n\ntwo "),
        ("ASSISTANT:", "one\n\ntwo "),
        (None, "one\n\ntwo ASSISTANT: three"),
        ([], "one\n\ntwo ASSISTANT: three"),
    ):
        (result,) = model.generate_until(instances(model, documents, {"until": until}))
        assert result.text == text, until


def test_repeats_of_one_sample_are_drawn_apart_and_the_same_again(sailvl_class: type) -> None:
    engine = Fake("x")
    model = sailvl_class(engine=engine)
    (request,) = instances(model, [user("?")], {"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    model.generate_until([request] * 3)
    model.generate_until([request] * 3)
    seeds = [asked.sampling.seed for asked in engine.asked]
    assert seeds == [0, 1, 2, 0, 1, 2] and engine.asked[0].sampling.temperature == 0.7


def test_what_cannot_be_done_is_refused(sailvl_class: type, tmp_path: Path) -> None:
    model = sailvl_class(engine=Fake("x"))
    for call in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            call([])
    for given in ({}, {"pretrained": "a", "base_url": "http://x/v1"}):
        with pytest.raises(ValueError, match="one of pretrained=DIR and base_url=URL"):
            sailvl_class(**given)
    with pytest.raises(ValueError, match=r"no model folder there"):
        sailvl_class(pretrained=str(tmp_path))


def test_a_server_is_asked_where_one_is_named(sailvl_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def remote(url: str, model: str | None, *, capacity: int) -> Fake:
        made.append((url, model, capacity))
        return Fake("from the server")

    monkeypatch.setattr(plugin, "Remote", remote)
    model = sailvl_class(base_url="http://x/v1", model="m", batch_size="auto:4", max_batch_size=None)
    (result,) = model.generate_until(instances(model, [user("?")]))
    assert result.text == "from the server" and made == [("http://x/v1", "m", 32)] and model.batch_size == 32
    engine = model.engine
    model.clean()
    assert engine.closed and model.cleaned and not hasattr(model, "engine")


# ---- their requests as ours -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, Sampling(max_new_tokens=1024)),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}, Sampling(max_new_tokens=16)),
        ({"do_sample": False, "temperature": 0.7}, Sampling(max_new_tokens=1024)),
        ({"temperature": 0.2}, Sampling(temperature=0.2, seed=5)),
        ({"do_sample": True}, Sampling(temperature=1.0, seed=5)),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.5}, Sampling()),
        ({"do_sample": True, "top_p": 0}, Sampling()),
        ({"do_sample": True, "top_p": 0.9, "top_k": 20}, Sampling(temperature=1.0, top_p=0.9, top_k=20, seed=5)),
        ({"temperature": None, "num_beams": None, "top_p": None, "until": None}, Sampling()),
    ],
)
def test_generation_arguments(arguments: dict[str, Any], wanted: Sampling) -> None:
    assert sampling(arguments, seed=5) == wanted


def test_beams_are_refused() -> None:
    with pytest.raises(ValueError, match="num_beams is 5"):
        sampling({"num_beams": 5})


def test_a_placeholder_in_a_text_calls_for_no_picture() -> None:
    image = picture(3)
    record, images = conversation(user("<image> and ", image, " <image>"), "task/0")
    assert record.messages[0].text == "<\u200bimage> and <image> <\u200bimage>" and images == [image]
    assert record.id == "task/0" and record.pictures == (Picture(width=80, height=60, ref=None),)
    record, _ = conversation([{"role": "user", "content": "plain"}, {"role": "assistant", "content": "<image>"}], "r")
    assert [turn.text for turn in record.messages] == ["plain", "<image>"]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "given",
    [
        lambda image, path: image,
        lambda image, path: np.asarray(image),
        lambda image, path: encoded(image),
        lambda image, path: {"bytes": encoded(image), "path": "gone.png"},
        lambda image, path: {"bytes": None, "path": str(path)},
        lambda image, path: str(path),
    ],
)
def test_a_picture_in_every_form_that_data_sets_have(given: Callable[..., Any], tmp_path: Path) -> None:
    image = picture(7)
    path = tmp_path / "a.png"
    image.save(path)
    _, (shown,) = conversation(user({"type": "image", "url": given(image, path)}), "r")
    assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), np.asarray(image))
    with pytest.raises((MediaError, ValueError)):
        conversation(user({"type": "image", "url": str(tmp_path / "gone.png")}), "r")


def test_frames_of_a_list_are_spread_and_a_short_list_is_whole() -> None:
    frames = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(20)]
    for count, wanted in ((4, [4, 8, 12, 16]), (20, list(range(20))), (30, list(range(20)))):
        record, shown = conversation(user({"type": "video", "url": frames}), "r", count)
        assert [frame.getpixel((0, 0))[0] for frame in shown] == wanted
        assert all(one.frame for one in record.pictures) and record.messages[0].text == "<image>" * len(wanted)
