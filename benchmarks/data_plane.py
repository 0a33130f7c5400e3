"""Disk to tensors: our loader against `datasets` (streaming) and `webdataset` on the same files.

    python benchmarks/data_plane.py [--json OUT] [--samples 2000] [--venvs FOLDER] [--repeats 3]

The opponents run in an environment of their own, made under --venvs (default: a temporary folder, deleted afterwards;
needs a package index), each arm in a process of its own, on one thread, without workers.

Files: --samples pictures of 480 x 480 drawn from the packaged corpus, saved as JPEG (quality 92), each with a short
conversation; as JSON lines beside the pictures, as 4 Parquet files (pictures inside, row groups of 125) and as 4 tar
shards. Equal work: all arms decode every JPEG, cut it by our image processor (tiles of 448 pixels, at most 4) and make
ids of the conversation by our ``encode``, and put 29 samples (what our packs of 8192 tokens hold) into one batch of
tensors by our ``collate``. What differs is reading, shuffling and, ours alone, planning: ours measures every sample
first and packs out of 256 waiting ones; the opponents draw out of a shuffle buffer of 256. ``encode only`` is the same
work on rows in memory, in order: no loader at all.

us_per_sample: processor time of the process per sample, after the buffers are full; the median of --repeats runs.
images_per_second_per_core is its inverse. open_seconds: until the first sample.

Exactness: 1000 small samples, one pass; stopped after 400 samples, state saved, continued by a new loader.
lost and repeated: samples of the uninterrupted pass that never came, and those that came once too often (ours: of as
many steps). webdataset has no state to save: its pass begins anew.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sailvl import assets
from sailvl.data.batch import collate
from sailvl.data.conversation import to_record
from sailvl.data.encode import encode
from sailvl.data.pictures import find_file, open_pictures
from sailvl.doctor import cpu_name
from sailvl.geometry import Tiling
from sailvl.model.processing import build_processor

ROOT = Path(__file__).resolve().parents[1]
SHARDS, GROUP, BUFFER, PACK, BATCH = 4, 125, 256, 8192, 29
OPPONENTS = ["datasets", "webdataset", "torchdata"]
NEEDED = ["torch==2.13.0", "transformers>=5.18,<6", "numpy", "pillow", "pydantic", "pyyaml", "safetensors"]
ARMS = ("encode only", "ours jsonl", "ours parquet", "ours webdataset", "datasets parquet", "webdataset tar")
RESUMES = ((0, 0), (2, 2), (2, 3))
SMALL, CUT = 1000, 400


# ---- files --------------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=92)
    return out.getvalue()


def write_files(folder: Path, samples: list[tuple[str, bytes]]) -> None:
    """The same samples three times; each is a question with its number, and a JPEG."""
    import pyarrow as pa  # noqa: PLC0415  (as every import below: the opponents' environment lacks some of ours)
    import pyarrow.parquet as pq  # noqa: PLC0415

    for name in ("pictures", "parquet", "tar"):
        (folder / name).mkdir(parents=True)
    lines, rows, files = [], [], []
    for number, (answer, data) in enumerate(samples):
        turns = [
            {"role": "user", "content": f"<image>\nWhat is shown in sample {number}?"},
            {"role": "assistant", "content": answer},
        ]
        (folder / "pictures" / f"{number:05d}.jpg").write_bytes(data)
        lines.append(json.dumps({"id": str(number), "images": [f"pictures/{number:05d}.jpg"], "messages": turns}))
        rows.append({"id": str(number), "messages": turns, "images": [{"bytes": data, "path": None}]})
        files.append([(f"{number:05d}.jpg", data), (f"{number:05d}.json", json.dumps({"messages": turns}).encode())])
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    each = -(-len(samples) // SHARDS)
    for shard in range(SHARDS):
        part = slice(shard * each, (shard + 1) * each)
        table = pa.Table.from_pylist(rows[part])
        pq.write_table(table, folder / "parquet" / f"{shard}.parquet", row_group_size=GROUP)
        with tarfile.open(folder / "tar" / f"{shard}.tar", "w") as archive:
            for name, data in (file for sample in files[part] for file in sample):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def make(folder: Path, count: int) -> None:
    from sailvl.curate.synth import FAMILIES, SynthSource  # noqa: PLC0415

    families = [name for name in FAMILIES if name != "clip"]
    source = SynthSource("bench", families=families, split="train", size=count, seed=0, side=480, max_turns=1)
    samples = []
    for row in range(count):
        record = source.record(row)
        samples.append((record.messages[1].text, jpeg(source.images(record)[0])))
    write_files(folder / "large", samples)
    noise = np.random.default_rng(0).integers(0, 256, (SMALL, 24, 24, 3), np.uint8)
    write_files(folder / "small", [(f"{row}.", jpeg(Image.fromarray(noise[row]))) for row in range(SMALL)])


# ---- arms: (folder, workers) -> something that gives the numbers of its samples, and its state --------------------


def processor(folder: Path) -> Any:
    side = 448 if folder.name == "large" else 56
    return build_processor(assets.tokenizer_path(), tiling=Tiling(side=side, max_tiles=4))


def work(row: dict[str, Any], made: Any, held: list[Any]) -> int:
    """A row to ids, targets and tiles, every 29 of them to a batch; gives its number."""
    record = to_record(row, partial(find_file, root=ROOT), id="x", where="row", num_frames=1, meta={})
    example = encode(record, open_pictures(record), made)
    assert example.num_tiles > 0
    held.append(example)
    if len(held) == BATCH:
        collate(held, 0, {})
        held.clear()
    return int(re.findall(r"sample (\d+)", record.messages[0].text)[0])


class Ours:
    """Our loader; ``state`` continues it."""

    def __init__(self, kind: str, folder: Path, workers: int, state: Any = None) -> None:
        from sailvl.data.loader import Loader  # noqa: PLC0415
        from sailvl.data.parquet import ParquetSource  # noqa: PLC0415
        from sailvl.data.source import JsonlSource  # noqa: PLC0415
        from sailvl.data.webdataset import WebDatasetSource  # noqa: PLC0415

        source: Any = {
            "jsonl": lambda: JsonlSource(folder / "data.jsonl", "d"),
            "parquet": lambda: ParquetSource(folder / "parquet", "d"),
            "webdataset": lambda: WebDatasetSource(folder / "tar", "d"),
        }[kind]()
        self.processor = processor(folder)
        pack = PACK if folder.name == "large" else PACK // 16
        self.loader = Loader(
            {"d": source}, {"d": 1.0}, self.processor, max_tokens=pack, max_tiles=10**6, buffer=BUFFER, seed=0,
            workers=workers,
        )  # fmt: skip
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.loader:
            text = self.processor.tokenizer.decode(step[0].ids_T)
            yield [int(number) for number in re.findall(r"in sample (\d+)\?", text)]

    def state(self) -> Any:
        return json.loads(json.dumps(self.loader.state_dict()))

    def close(self) -> None:
        self.loader.close()


class Theirs:
    """A torch dataset in the loader that its authors recommend; without a state a pass begins anew."""

    def __init__(self, kind: str, folder: Path, workers: int, state: Any = None) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: PLC0415

        data: Any = {"parquet": hub_dataset, "tar": web_dataset}[kind](folder)
        self.loader = StatefulDataLoader(data, batch_size=None, num_workers=workers)
        self.has_state = kind == "parquet"
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.loader:
            yield [int(number)]

    def state(self) -> Any:
        return self.loader.state_dict() if self.has_state else None

    def close(self) -> None:
        pass


def hub_dataset(folder: Path) -> Any:
    import datasets  # noqa: PLC0415

    files = sorted(str(path) for path in (folder / "parquet").iterdir())
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    made, held = processor(folder), list[Any]()

    def number(row: dict[str, Any]) -> dict[str, int]:
        return {"number": work({key: row[key] for key in ("messages", "images")}, made, held)}

    return numbers_of(data.shuffle(seed=0, buffer_size=BUFFER).map(number, remove_columns=["id", "messages", "images"]))


def web_dataset(folder: Path) -> Any:
    import webdataset  # noqa: PLC0415

    made, held = processor(folder), list[Any]()

    def number(sample: dict[str, Any]) -> int:
        return work({**json.loads(sample["json"]), "images": [sample["jpg"]]}, made, held)

    files = sorted(str(path) for path in (folder / "tar").iterdir())
    return webdataset.WebDataset(files, shardshuffle=SHARDS, seed=0).shuffle(BUFFER).map(number)


def numbers_of(data: Any) -> Any:
    """A `datasets` stream of plain numbers, its state passed through."""
    import torch  # noqa: PLC0415

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            for row in data:
                yield row["number"]

        def state_dict(self) -> Any:
            return data.state_dict()

        def load_state_dict(self, state: Any) -> None:
            data.load_state_dict(state)

    return Stream()


def arm(name: str) -> Callable[..., Any]:
    kind, _, what = name.partition(" ")
    return partial(Ours if kind == "ours" else Theirs, what)


# ---- one arm, in its own process ----------------------------------------------------------------------------------


def speed(name: str, folder: Path, count: int) -> dict[str, float]:
    started = time.perf_counter()
    if name == "encode only":
        made, rows, held = processor(folder), [], list[Any]()
        for line in (folder / "data.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append({**row, "images": [(folder / row["images"][0]).read_bytes()]})
        stream: Iterator[list[int]] = ([work(row, made, held)] for row in rows)
    elif name.startswith("ours"):
        stream = ([0] * step[0].num_samples for step in arm(name)(folder, 0).loader)
    else:
        stream = iter(arm(name)(folder, 0))
    next(stream)
    opened, cpu, done = time.perf_counter() - started, time.process_time(), 0
    wanted = count - BUFFER - 50
    for numbers in stream:
        done += len(numbers)
        if done >= wanted:
            break
    return {"us_per_sample": (time.process_time() - cpu) / done * 1e6, "open_seconds": opened, "samples": done}


def part(name: str, folder: Path, workers: int, limit: int | None, state: Any) -> tuple[list[int], Any]:
    """Numbers of at least ``limit`` samples (None: of the whole pass, or as many again), and the state after them."""
    loader, seen = arm(name)(folder, workers, state), list[int]()
    endless = name.startswith("ours")
    stop = limit if limit is not None else SMALL - CUT if endless else 10**9
    for numbers in loader:
        seen += numbers
        if len(seen) >= stop:
            break
    found = loader.state()
    loader.close()
    return seen, found


def exactness(name: str, folder: Path, before: int, after: int) -> dict[str, Any]:
    whole = [*islice(_whole(name, folder, before), 2 * SMALL)]
    first, state = part(name, folder, before, CUT, None)
    second, _ = part(name, folder, after, None, state)
    got = [*first, *second]
    expected = Counter(whole[: len(got)] if name.startswith("ours") else whole)
    if name.startswith("ours"):
        assert len(got) <= len(whole)
    lost, repeated = expected - Counter(got), Counter(got) - expected
    return {"lost": sum(lost.values()), "repeated": sum(repeated.values()), "same_order": got == whole[: len(got)]}


def _whole(name: str, folder: Path, workers: int) -> Iterator[int]:
    loader = arm(name)(folder, workers)
    for numbers in loader:
        yield from numbers
    loader.close()


def child(request: dict[str, Any]) -> None:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    if request["what"] == "speed":
        result: dict[str, Any] = speed(request["arm"], Path(request["folder"]), request["count"])
    else:
        try:
            result = exactness(request["arm"], Path(request["folder"]), *request["workers"])
        except Exception as error:  # noqa: BLE001  (that a resume fails is a result)
            result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    print(f"RESULT {json.dumps(result)}", flush=True)
    os._exit(0)


# ---- all of it ----------------------------------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """The opponents' interpreter, installed if it is not there."""
    python = folder / "data-plane" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "data-plane")], check=True)
        pins = ["-c", str(ROOT / "constraints.txt"), *OPPONENTS, *NEEDED]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
    return python


def ask(python: Path, request: dict[str, Any], timeout: float = 900) -> dict[str, Any]:
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [str(python), __file__, "--child", json.dumps(request)], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, **quiet, "PYTHONPATH": str(ROOT), "HF_HOME": request["folder"] + "/.cache"}, check=False,
    )  # fmt: skip
    found = re.findall(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(f"{request}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(found[-1])
    return answer


def versions(python: Path) -> dict[str, str]:
    code = (
        f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {[*OPPONENTS, 'torch']}}}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([str(python), "-c", code], text=True))
    return found


def run(args: argparse.Namespace, folder: Path, python: Path, command: str) -> dict[str, Any]:
    make(folder, args.samples)
    sizes = [path.stat().st_size for path in (folder / "large" / "pictures").iterdir()]
    arms: dict[str, dict[str, Any]] = {}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for repeat in range(args.repeats):
        for name in sorted(ARMS, reverse=bool(repeat % 2)):
            with_ = Path(sys.executable) if name.startswith(("ours", "encode")) else python
            request = {"what": "speed", "arm": name, "folder": str(folder / "large"), "count": args.samples}
            measured[name].append(ask(with_, request))
    for name, rows in measured.items():
        micros = statistics.median(row["us_per_sample"] for row in rows)
        arms[name] = {
            "us_per_sample": round(micros, 1),
            "images_per_second_per_core": round(1e6 / micros, 1),
            "open_seconds": round(statistics.median(row["open_seconds"] for row in rows), 2),
            "runs": [round(row["us_per_sample"], 1) for row in rows],
        }
        arms[name]["us_of_loading"] = round(
            micros - statistics.median(r["us_per_sample"] for r in measured[ARMS[0]]), 1
        )
        print(f"{name:20}{micros:10.0f} us/sample{1e6 / micros:10.1f} images/s/core", flush=True)
    resume: dict[str, dict[str, Any]] = {}
    for name in ARMS[1:]:
        with_ = Path(sys.executable) if name.startswith("ours") else python
        resume[name] = {}
        for before, after in RESUMES:
            request = {"what": "exact", "arm": name, "folder": str(folder / "small"), "workers": [before, after]}
            resume[name][f"{before} -> {after} workers"] = ask(with_, request)
        print(name, resume[name], flush=True)
    return {
        "samples": args.samples,
        "mean_jpeg_bytes": round(statistics.mean(sizes)),
        "arms": arms,
        "resume": resume,
        "versions": versions(python),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": os.getloadavg(),
        "command": command,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--venvs", type=Path, help="folder of the opponents' environment (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child)
    if args.samples < 2 * BUFFER:
        parser.error(f"at least {2 * BUFFER} samples: the buffers hold {BUFFER}")
    command = shlex.join(["python", "benchmarks/data_plane.py", *(sys.argv[1:] if argv is None else argv)])
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="data-plane-") as temporary:
        venvs = args.venvs or Path(temporary) / "venvs"
        result = run(args, Path(temporary) / "files", environment(venvs), command) | {"load_average_before": load}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
