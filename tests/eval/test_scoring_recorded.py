"""Our verdicts against recorded ones of the scorer behind published figures (see data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval import oracle

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "data" / "recorded.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def stop_latex():
    yield
    oracle.LATEX.close()


def same(expected: Any, ours: Any) -> bool:
    """Ours may leave keys out, never add one; floats agree to 1e-9; true is not 1."""
    if isinstance(expected, dict) and isinstance(ours, dict):
        return bool(ours) and all(key in expected and same(expected[key], value) for key, value in ours.items())
    if isinstance(expected, list) and isinstance(ours, list):
        return len(expected) == len(ours) and all(map(same, expected, ours))
    if isinstance(expected, bool) or isinstance(ours, bool):
        return expected is ours
    if isinstance(expected, int | float) and isinstance(ours, int | float):
        return abs(expected - ours) <= 1e-9 * max(1, abs(expected))
    return bool(expected == ours)


@pytest.mark.parametrize("family", sorted(RECORDED))
def test_every_recorded_verdict_is_ours(family):
    cases = RECORDED[family]
    values, _ = oracle.FAMILIES[family](cases)
    assert set(values) == {case["id"] for case in cases}
    wrong = [(case, values[case["id"]]) for case in cases if not same(case["expected"], values[case["id"]])]
    assert not wrong, wrong[:2]


def test_most_families_are_recorded():
    assert len(RECORDED) >= 38 and sum(map(len, RECORDED.values())) >= 250


def test_the_runner_writes_what_it_knows_and_names_what_it_does_not(tmp_path, capsys):
    folder = tmp_path / "cases"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"family": "yorn_extract", "cases": RECORDED["yorn_extract"]}))
    (folder / "b.json").write_text(json.dumps({"family": "from the future", "cases": []}))
    (folder / "c.json").write_text("[1]")
    found = oracle.answer(folder)
    assert list(found) == ["yorn_extract"] and len(found["yorn_extract"]["cases"]) == len(RECORDED["yorn_extract"])
    said = capsys.readouterr().err
    assert "from the future" in said and "c.json" in said
