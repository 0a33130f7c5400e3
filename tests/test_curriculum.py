from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.config import load, to_dict
from sailvl.curriculum import (
    WSD,
    AdaLRS,
    Checkpoint,
    Constant,
    Cosine,
    Curriculum,
    Jsonl,
    Probe,
    Soup,
    Stage,
    Train,
    adalrs_window,
    check,
    plan,
    shrink,
    stage_hash,
)
from sailvl.recipes import RECIPES, recipe
from sailvl.types import Mixture


def stage(name: str, init: str | None = None, **changes: Any) -> Train:
    base = Train(
        name=name,
        init=init,
        data=Mixture(shares={"a": 1.0}),
        trains=("lm",),
        steps=100,
        max_tokens=64,
        max_tiles=2,
        lr=1e-3,
    )
    return replace(base, **changes)


def curriculum(*stages: Stage, **changes: Any) -> Curriculum:
    base = Curriculum(name="x", sources={"a": Jsonl(path="a.jsonl"), "b": Jsonl(path="b.jsonl")}, stages=stages)
    return replace(base, **changes)


def faults(*stages: Stage, **changes: Any) -> dict[str, str]:
    return dict(check(curriculum(*stages, **changes)))


def test_a_sound_graph_has_no_faults() -> None:
    assert not faults(stage("a"), stage("b", "a"), stage("c", "a"), Soup(name="d", of=("b", "c")), stage("e", "d"))


def test_every_fault_at_once() -> None:
    found = faults(
        stage("one", "two"),
        stage("two", "oen"),
        stage("two", "two", data=Mixture(shares={"a": 0.5, "capt": 0.5})),
        stage("three", "three"),
        stage("four", "one", trains=("vit", "vit"), fresh=("projector",)),
        stage("five", "one", schedule=Cosine(warmup_steps=100)),
        stage("six", "one", schedule=WSD(warmup_steps=50, decay_steps=51)),
        stage("seven", "one", schedule=AdaLRS(base=Constant(warmup_steps=11), window=8)),
        Soup(name="eight", of=("one", "one", "nine", "four ")),
        Soup(name="nine", of=("nine",)),
    )
    assert found == {
        "stages.0.init": "'two' comes later; put it before this stage",
        "stages.1.init": "no earlier stage is called 'oen'; did you mean 'one'?",
        "stages.2.name": "'two' is already the name of stages.1",
        "stages.2.data.shares.capt": "no source has this name; known: a, b",
        "stages.3.init": "a stage cannot start from itself",
        "stages.4.fresh": "a fresh projector that is not trained stays random; add it to trains",
        "stages.4.trains": "a part is listed twice: vit, vit",
        "stages.5.schedule.warmup_steps": "100 steps of warm-up do not end before the stage does (100 steps)",
        "stages.6.schedule.decay_steps": "warm-up (50) and decay (51) exceed the stage's 100 steps",
        "stages.7.schedule.base.warmup_steps": "warm-up ends at step 11, after the search starts (10)",
        "stages.7.schedule.window": "the search lasts 30 steps, fewer than 4 windows of 8: raise steps or lower window",
        "stages.8.of.1": "'one' is listed twice",
        "stages.8.of.2": "'nine' comes later; put it before this stage",
        "stages.8.of.3": "no earlier stage is called 'four '; did you mean 'four'?",
        "stages.9.of.0": "a stage cannot start from itself",
    }


@pytest.mark.parametrize(
    ("steps", "window", "sound"),
    [(100, 7, True), (100, 8, False), (667, None, True), (666, None, False), (100, 2, False)],
)
def test_adalrs_needs_four_windows(steps: int, window: int | None, sound: bool) -> None:
    assert (not faults(stage("a", steps=steps, schedule=AdaLRS(window=window)))) == sound


def test_adalrs_window_is_a_hundredth_and_at_least_fifty() -> None:
    assert [adalrs_window(AdaLRS(), steps) for steps in (1000, 5000, 5001, 31_250)] == [50, 50, 51, 313]
    assert "stages.0.schedule.start" in faults(stage("a", schedule=AdaLRS(window=5, start=0.5, stop=0.5)))


def test_soups_want_one_family() -> None:
    ancestor, other = stage("a"), stage("b")
    children = stage("c", "a"), stage("d", "a"), stage("e", "b")
    assert not faults(ancestor, *children[:2], Soup(name="s", of=("c", "d")))
    assert not faults(ancestor, children[0], Soup(name="s", of=("a", "c")))
    assert "stages.3.of" in faults(ancestor, other, children[2], Soup(name="s", of=("a", "e")))
    reborn = stage("f", "a", trains=("projector",), fresh=("projector",))
    assert "stages.3.of" in faults(ancestor, children[0], reborn, Soup(name="s", of=("c", "f")))
    after = stage("g", "f"), stage("h", "f")
    assert not faults(ancestor, reborn, *after, Soup(name="s", of=("g", "h")))
    nested = Soup(name="s", of=("c", "d")), stage("t", "s"), Soup(name="u", of=("t", "d"))
    assert not faults(ancestor, *children[:2], *nested)
    # Two runs from one given checkpoint branch from a trained model; two from fresh weights do not.
    pair = stage("a"), stage("b"), Soup(name="s", of=("a", "b"))
    assert "stages.2.of" in faults(*pair)
    assert not faults(*pair, model=Checkpoint(path="m"))


def test_names_are_folder_names() -> None:
    for name in ("", "A", "a/b", "..", "a b", ".a", "a" * 65, "a.b"):
        with pytest.raises(ValueError, match="names a folder"):
            stage(name)


def test_plan_has_a_row_per_stage() -> None:
    rows = plan(
        curriculum(
            stage("a", lanes=3, steps=10, schedule=AdaLRS(base=WSD(decay_steps=2))),
            stage(
                "b", "a", trains=("projector", "lm"), fresh=("projector",), data=Mixture(shares={"a": 0.25, "b": 0.75})
            ),
            Soup(name="s", of=("b",)),
        )
    )
    assert [(row.name, row.init, row.steps, row.max_tokens) for row in rows] == [
        ("a", "start", 10, 10 * 3 * 64),
        ("b", "a", 100, 6400),
        ("s", "b", 0, 0),
    ]
    assert rows[0].schedule == "adalrs on wsd" and rows[2].lr is None
    assert (rows[1].trains, rows[1].data) == ("projector (fresh), lm", "b 75%, a 25%")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("factor", [1, 3, 17.5, 1e6])
def test_shipped_recipes_are_sound_shrunk_or_not(name: str, factor: float) -> None:
    whole = recipe(name)
    small = shrink(whole, factor)
    assert check(whole) == check(small) == []
    assert load(Curriculum, to_dict(small)) == small
    for before, after in zip(whole.stages, small.stages, strict=True):
        assert (before.name, before.kind) == (after.name, after.kind)
        if isinstance(before, Train) and isinstance(after, Train):
            kept = replace(after, steps=before.steps, schedule=before.schedule, log_every=before.log_every)
            assert kept == before and after.steps <= before.steps


SCHEDULES = st.one_of(
    st.builds(Constant, warmup_steps=st.integers(0, 40)),
    st.builds(Cosine, warmup_steps=st.integers(0, 40)),
    st.builds(WSD, warmup_steps=st.integers(0, 40), decay_steps=st.integers(0, 60)),
    st.builds(AdaLRS, base=st.builds(WSD, warmup_steps=st.integers(0, 10), decay_steps=st.integers(0, 60))),
    st.builds(AdaLRS, window=st.integers(3, 40), start=st.floats(0.05, 0.2), stop=st.floats(0.3, 0.9)),
)


@given(SCHEDULES, st.integers(100, 2000), st.floats(1, 1e4))
def test_shrinking_keeps_a_sound_curriculum_sound(schedule: Any, steps: int, factor: float) -> None:
    whole = curriculum(stage("a", steps=steps, schedule=schedule))
    if not check(whole):
        assert check(shrink(whole, factor)) == []
        assert shrink(whole, 1).stages[0].steps == steps  # type: ignore[union-attr]


def test_shrink_refuses_to_grow() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        shrink(curriculum(stage("a")), 0.5)
    probed = curriculum(stage("a"), probe=Probe(families=("x",), samples=20))
    assert [shrink(probed, factor).probe.samples for factor in (1, 10, 100)] == [20, 2, 1]  # type: ignore[union-attr]


CHAIN = (stage("a"), stage("b", "a", data=Mixture(shares={"b": 1.0})), stage("c", "a"), Soup(name="s", of=("b", "c")))


def hashes(value: Curriculum, prints: dict[str, str] | None = None) -> dict[str, str]:
    return {each.name: stage_hash(value, each.name, prints) for each in value.stages}


@pytest.mark.parametrize(
    ("changed", "redone"),
    [
        (curriculum(replace(CHAIN[0], lr=2e-3), *CHAIN[1:]), "abcs"),
        (curriculum(CHAIN[0], replace(CHAIN[1], seed=1), *CHAIN[2:]), "bs"),
        (curriculum(*CHAIN[:3], replace(CHAIN[3], of=("c", "b"))), "s"),
        (curriculum(*CHAIN, model=Checkpoint(path="m")), "abcs"),
        (curriculum(*CHAIN, sources={"a": Jsonl(path="a.jsonl"), "b": Jsonl(path="c.jsonl")}), "bs"),
        (curriculum(*(replace(each, log_every=7) if isinstance(each, Train) else each for each in CHAIN)), ""),
        (curriculum(*(replace(each, save_every=7) if isinstance(each, Train) else each for each in CHAIN)), ""),
        (curriculum(*CHAIN, probe=Probe(families=("x",), samples=1), name="other"), ""),
        (curriculum(*CHAIN[:2], stage("new"), *CHAIN[2:]), ""),
    ],
)
def test_a_change_redoes_the_stage_and_its_descendants(changed: Curriculum, redone: str) -> None:
    before, after = hashes(curriculum(*CHAIN)), hashes(changed)
    assert "".join(name for name in "abcs" if before[name] != after[name]) == redone


def test_changed_data_redoes_what_used_it() -> None:
    before = hashes(curriculum(*CHAIN), {"a": "1", "b": "1"})
    after = hashes(curriculum(*CHAIN), {"a": "1", "b": "2"})
    assert [name for name in before if before[name] != after[name]] == ["b", "s"]
    assert len(set(before.values())) == 4
    with pytest.raises(KeyError):
        stage_hash(curriculum(*CHAIN), "nobody")


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys, sailvl.recipes as r, sailvl.curriculum as c; c.check(r.recipe('nano')); c.plan(r.recipe('nano'));"
    )
    code += "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'PIL')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
