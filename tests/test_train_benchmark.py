"""benchmarks/train and benchmarks/gpu: arms do equal work, unequal work is noticed, an arm that cannot run says why."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sailvl.model import checkpoint
from sailvl.train.step import loss_sum

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "train"
NAMES = ("arm_nanovlm", "arm_trainer", "compare", "data", "work")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def prepared(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("work")
    return scripts["work"].prepare(folder, updates=3, max_tokens=512, lanes=2, write=scripts["data"].write)


def test_the_loader_repeats_the_samples_that_were_listed(scripts: dict[str, ModuleType], prepared: Any) -> None:
    work = scripts["work"].Work.read(Path(prepared.folder))
    assert work == prepared and all(len(set(rows)) == len(rows) > 3 for rows in work.updates)
    source = scripts["work"].Noted(Path(work.folder) / "data.jsonl", "mixed")
    source.rows = []
    loader, samples = work.loader(source), scripts["work"].Samples(work)
    for rows, tokens, supervised in zip(work.updates, work.tokens, work.supervised, strict=True):
        source.rows = []
        batches = next(loader)
        assert source.rows == rows and sum(len(batch.ids_T) for batch in batches) == tokens
        assert sum(len(batch.rows_R) for batch in batches) == supervised
        examples = [samples[row] for row in rows]
        assert torch.equal(torch.cat([batch.ids_T for batch in batches]), cat(x.ids_T for x in examples))
        assert torch.equal(torch.cat([batch.tiles_N3SS for batch in batches]), cat(x.tiles_N3SS for x in examples))


def cat(arrays: Any) -> torch.Tensor:
    return torch.cat([torch.from_numpy(array) for array in arrays])


def test_a_padded_batch_is_its_samples(scripts: dict[str, ModuleType], prepared: Any) -> None:
    samples = scripts["work"].Samples(prepared)
    examples = [samples[row] for row in prepared.updates[0]]
    batch = scripts["work"].padded(examples, pad=7)
    lengths = [example.num_tokens for example in examples]
    assert batch["attention_mask"].sum(1).tolist() == lengths and batch["input_ids"].shape[1] == max(lengths)
    for row, example in enumerate(examples):
        count = example.num_tokens
        assert torch.equal(batch["input_ids"][row, :count], torch.from_numpy(example.ids_T))
        assert torch.equal(batch["labels"][row, 1:count], torch.from_numpy(example.targets_T[:-1]))
        assert (batch["labels"][row, count:] == -100).all() and (batch["input_ids"][row, count:] == 7).all()
    assert len(batch["pixel_values"]) == sum(example.num_tiles for example in examples)


@pytest.mark.parametrize(("micro", "sort"), [(8, False), (2, True), (1, False)])
def test_every_sample_is_in_one_forward_pass_of_its_update(
    scripts: dict[str, ModuleType], prepared: Any, micro: int, sort: bool
) -> None:
    samples = scripts["work"].Samples(prepared)
    batches, passes = scripts["arm_trainer"].batches(prepared, samples, micro, sort)
    assert len(batches) == passes * len(prepared.updates) and all(batches)
    for number, rows in enumerate(prepared.updates):
        mine = [row for batch in batches[number * passes : (number + 1) * passes] for row in batch]
        assert sorted(mine) == sorted(rows) and (sort or mine == rows)
        lengths = [samples[row].num_tokens for row in mine]
        assert not sort or lengths == sorted(lengths)


def test_nanovlm_with_the_mask_is_a_pack_and_without_it_leaks(scripts: dict[str, ModuleType], prepared: Any) -> None:
    """Two bags as nanoVLM makes them: a padding token behind each sample, filled up on the left."""
    work, arm = scripts["work"], scripts["arm_nanovlm"]
    samples = work.Samples(prepared)
    stream = arm.Stream(samples, prepared.updates[0])
    bags, length = (range(0, 3), range(3, len(stream))), 1024
    ids, labels = torch.zeros(2, length, dtype=torch.long), torch.full((2, length), -100)
    mask, images = torch.zeros(2, length, dtype=torch.long), []
    for bag, numbers in enumerate(bags):
        chosen = [stream[number] for number in numbers]
        at = length - sum(len(sample["input_ids"]) + 1 for sample in chosen)
        images.append([tile for sample in chosen for tile in sample["images"]])
        for sample in chosen:
            count = len(sample["input_ids"])
            ids[bag, at : at + count], labels[bag, at : at + count] = sample["input_ids"], sample["labels"]
            mask[bag, at : at + count] = 1
            at += count + 1
    losses, runs = {}, {}
    for mode in ("fixed", "leaking"):
        runs[mode] = work.Run()
        model = arm.Adapter(prepared.model("sdpa"), mode, runs[mode])
        losses[mode] = model(ids, images, attention_mask=mask, targets=labels)[1].item()
    ours = prepared.model(checkpoint.PACKED)
    batches = next(prepared.loader(prepared.source()))
    with torch.no_grad():
        expected = sum(loss_sum(ours, batch, "fp32").item() for batch in batches) / prepared.supervised[0]
    assert abs(losses["fixed"] - expected) < 1e-5 * expected
    assert abs(losses["leaking"] - expected) > 1e-3 * expected
    run = runs["fixed"]
    assert (run.samples, run.real, run.supervised) == (len(stream), prepared.tokens[0], prepared.supervised[0])
    assert run.positions == 2 * length


def fake(losses: list[float], seconds: float = 1.0, **changed: Any) -> dict[str, Any]:
    return {
        "losses": losses, "seconds": seconds, "seconds_per_update": [seconds / 2] * 2, "samples": 4, "real_tokens": 60,
        "positions": 100, "supervised": 20, "peak_gb": 1.0, "load": 0.5, "updates": 2, "versions": {},
        "cpu_seconds": seconds, **changed,
    }  # fmt: skip


def test_an_arm_that_does_other_work_gets_no_ratio(scripts: dict[str, ModuleType]) -> None:
    compare = scripts["compare"]
    work = scripts["work"].Work(
        folder="", max_tokens=64, lanes=1, updates=[[1], [2]], tokens=[30, 30], supervised=[10, 10],
        flops=[3_000_000_000, 1_000_000_000], state={},
    )  # fmt: skip
    ours = [compare.figures(fake([9.0, 8.0]), work)]
    assert ours[0]["useful_gflop_per_second"] == 4.0 and ours[0]["padding_share"] == 0.4
    assert ours[0]["supervised_tokens_per_second"] == 20.0 and ours[0]["samples_per_second"] == 4.0
    half = [compare.figures(fake([9.0002, 8.0], 2.0), work)]
    same = compare.summary("trainer", half, ours)
    assert same["same_work"] and same["sailvl_is_times_as_fast"] == 2.0
    assert same["ratio_by_processor_time"] == 2.0
    for losses in ([9.002, 8.0], [9.0, 8.01]):
        other = compare.summary("trainer", [compare.figures(fake(losses, 2.0), work)], ours)
        assert not other["same_work"] and other["sailvl_is_times_as_fast"] is None
        assert other["sailvl_is_times_as_fast_at_other_work"] == 2.0
    assert compare.summary("nanovlm-fixed", [compare.figures(fake([9.0, 8.5]), work)], ours)["same_work"]
    assert not compare.summary("nanovlm-leaking", half, ours)["same_work"]


def test_the_command_trains_verifies_and_says_what_did_not_run(
    scripts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, arms = tmp_path / "train.json", ["trainer", "trl", "nanovlm-fixed", "swift"]
    options = "--steps 2 --max-tokens 512 --lanes 1 --precision fp32 --timeout 200"
    scripts["compare"].main(["--arms", *arms, "--json", str(path), *options.split()])
    found = json.loads(path.read_text())
    assert set(found["arms"]) == {"sailvl", "trainer"} and set(found["not_run"]) == {"trl", "nanovlm-fixed", "swift"}
    assert all("--venvs" in reason for reason in found["not_run"].values())
    ours, trainer = found["arms"]["sailvl"], found["arms"]["trainer"]
    assert trainer["same_work"] and trainer["loss_difference"] < 1e-5 and trainer["verified_updates"] == 2
    assert trainer["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-5) and len(ours["losses"]) == 2
    for key in ("samples", "supervised", "updates"):
        assert ours[key] == trainer[key] > 0
    assert ours["supervised"] == found["work"]["supervised_tokens"]
    assert ours["padding_share"] == 0 < trainer["padding_share"] < 1
    printed = capsys.readouterr().out
    assert "same (first loss off by" in printed and "swift: not run" in printed


def test_the_gpu_benchmark_runs_without_one(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    script = importlib.import_module("benchmarks.gpu.train_2b")
    options = (
        "--trains projector --compile off --checkpointing none --size nano --device cpu --max-tokens 512 --steps 2 "
        "--warmup 1 --workers 0"
    )
    script.main([*options.split(), "--json", str(path)])
    (case,) = json.loads(path.read_text())["cases"]
    assert "failed" not in case and case["mfu"] is None and case["parameters"] == 4_479_008
    assert case["tokens_per_second"] > 0 and 0.3 < case["image_token_share"] < 0.6 and case["pack_fill"] > 0.9
