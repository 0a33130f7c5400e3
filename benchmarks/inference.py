"""Claim: answering on a CPU is bound by reading the weights, and int8 weights take 1.8 times the tokens from it.

    python benchmarks/inference.py --size 2b --json benchmarks/results/inference.json [--dir FOLDER] [--threads 2]

A checkpoint of the size in the released layout (bf16, an index, the tied head stored as well) is written once, with
random weights: speed does not depend on their values. Beside it one of transformers' class
``InternVLForConditionalGeneration`` with the same language model and an encoder of equal width, depth, heads, patches,
parameters and FLOPs (its MLP has two matrices, 3/2 as wide as SAIL-ViT's three; it has a class token, and biases and a
scale in each block).

Each arm runs in processes of its own, one after the other, with the same threads:

    bf16            this project's model as the local engine drives it: the library's forward pass reads the prompt,
                    ``decode.decode_step`` writes, the greedy choice included
    int8            the same after ``quant.quantize``
    generate        this project's model, bf16, under the library's ``generate``
    transformers    InternVL, bf16, under the library's ``generate``

load      seconds until the model is there and each of its weights was read once; "cold" after asking the system to
          forget the files. Imports are not counted. int8 quantises on loading.
peak      largest resident memory of the process that loads, in GB: pages of mapped files included, which the system
          can take back at any time; "anonymous" (sampled) is without them. "ratio" is peak / size of the files.
tile      seconds to encode one tile. prefill: tokens of a prompt read per second.
decode    tokens per second for one answer after a prompt of so many tokens, from the median (and the fastest) token.
matrices  milliseconds of one token's matrix products alone; "overhead" is all the rest of its fastest token.
floor     bytes of weights, scales, keys and values that one token reads / memory bandwidth, which is measured in the
          same run: a buffer of 1 GiB read by all threads, best of ten.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from sailvl.doctor import cpu_name
from sailvl.model import SailVLForConditionalGeneration, checkpoint, decode
from sailvl.model.cache import BatchCache
from sailvl.model.modeling import RENAMES
from sailvl.model.quant import Int8Linear, quantize

ARMS = ("bf16", "int8", "generate", "transformers")
SHARD_BYTES = 5_000_000_000
ROWS = 4
"""Answers at once, in the measurement of several."""


# ---- the checkpoints ----------------------------------------------------------------------------------------------


def released_config(size: str) -> dict[str, Any]:
    """``config.json`` as releases write it."""
    config = checkpoint.config_for(size)
    text = {key: value for key, value in config.text_config.to_dict().items() if "dtype" not in key}
    vision = {key: value for key, value in config.vision_config.to_dict().items() if "dtype" not in key}
    return {
        "model_type": "sailvl", "architectures": ["SAILVLModel"], "torch_dtype": "bfloat16", "select_layer": -1,
        "ps_version": "v2", "downsample_ratio": 0.5, "max_dynamic_patch": 12,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "llm_config": {**text, "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16"},
        "vision_config": vision,
    }  # fmt: skip


def internvl_config(size: str) -> InternVLConfig:
    """InternVL with the language model of a size and an encoder as near to its SAIL-ViT as the class allows."""
    config = checkpoint.config_for(size)
    vision, text = config.vision_config, config.text_config.to_dict()
    return InternVLConfig(
        text_config=text,
        vision_config={
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size * 3 // 2,
            "norm_type": "rms_norm",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        image_token_id=config.image_token_id,
        image_seq_length=config.tokens_per_tile,
        tie_word_embeddings=text["tie_word_embeddings"],
        dtype="bfloat16",
    )


def released_name(name: str) -> str:
    """The released name of one of our tensors: the renames, backwards."""
    for pattern, ours in RENAMES:
        if name.startswith(ours):
            return pattern.removeprefix("^").replace("\\.", ".") + name.removeprefix(ours)
    return name


def tensors(model: nn.Module, rename: Callable[[str], str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Random bf16 values for each parameter of a model without memory (device "meta"), one after the other."""
    generator = torch.Generator().manual_seed(0)
    embedding = None
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim == 1:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            value.normal_(0.0, 0.02, generator=generator)
        if name.endswith("embed_tokens.weight"):
            embedding = value
        yield rename(name), value
    if embedding is not None and "lm_head.weight" not in dict(model.named_parameters()):
        yield rename("lm_head.weight"), embedding.clone()


def write(folder: Path, model: nn.Module, config: dict[str, Any], rename: Callable[[str], str]) -> None:
    """A checkpoint folder, unless it is there already; complete or absent, whatever interrupts it."""
    if (folder / "model.safetensors.index.json").exists():
        return
    size = sum(parameter.numel() * 2 for parameter in model.parameters()) * 5 // 4
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size + 2**30:
        raise SystemExit(f"{folder}: the checkpoint needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; use --dir")
    print(f"writing {folder} (about {size / 1e9:.1f} GB, once)", file=sys.stderr, flush=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    shards: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}
    total = held = 0

    def flush() -> None:
        save_file(waiting, fresh / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, value in tensors(model, rename):
        if held and held + value.nbytes > SHARD_BYTES:
            flush()
            held = 0
        waiting[name] = value
        held, total = held + value.nbytes, total + value.nbytes
    flush()
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (fresh / f"shard-{index}.safetensors").rename(fresh / file)
        weight_map |= dict.fromkeys(names, file)
    (fresh / "config.json").write_text(json.dumps(config, indent=1))
    (fresh / "generation_config.json").write_text("{}")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (fresh / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()
    fresh.rename(folder)


def folders(size: str, base: Path) -> dict[str, Path]:
    """Folders of both checkpoints, written if missing."""
    found = {"sailvl": base / f"sailvl-{size}", "internvl": base / f"internvl-{size}"}
    with torch.device("meta"):
        ours = SailVLForConditionalGeneration(checkpoint.config_for(size))
        theirs = InternVLForConditionalGeneration(internvl_config(size))
    write(found["sailvl"], ours, released_config(size), released_name)
    write(found["internvl"], theirs, internvl_config(size).to_dict(), lambda name: name)
    return found


# ---- one arm, in a process of its own -----------------------------------------------------------------------------


def load_arm(arm: str, folder: Path, threads: int, cold: bool) -> dict[str, Any]:
    """Load once and read every weight: seconds and memory."""
    torch.set_num_threads(threads)
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        if cold:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        while not cold and os.read(handle, 1 << 24):
            pass
        os.close(handle)
    before = memory()["RssAnon"]
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], memory()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
        model = open_model(arm, folder)
        returned = time.perf_counter() - begin
        with torch.inference_mode():
            for value in (*model.parameters(), *model.buffers()):
                value.reshape(-1).view(torch.uint8).amax()
        seconds = time.perf_counter() - begin
    finally:
        done.set()
        watcher.join()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    found = memory()
    return {
        "seconds": round(seconds, 3), "returned_after": round(returned, 3), "peak_gb": round(found["VmHWM"], 3),
        "peak_ratio": round(found["VmHWM"] / size, 3), "anonymous_peak_gb": round(max(peak[0], found["RssAnon"]), 3),
        "anonymous_before_gb": round(before, 3), "resident_after_gb": round(found["VmRSS"], 3),
    }  # fmt: skip


def memory() -> dict[str, float]:
    """Resident memory of this process by kind, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon")))
    return {name: int(value.split()[0]) * 1024 / 1e9 for name, value in pairs}


def open_model(arm: str, folder: Path) -> Any:
    if arm == "transformers":
        return InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model = checkpoint.load(folder, dtype=torch.bfloat16).eval()
    return quantize(model) if arm == "int8" else model


@torch.inference_mode()
def speed_arm(arm: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per tile, and per prompt length prefill and decode speed."""
    torch.set_num_threads(args.threads)
    model = open_model(arm, folder)
    side = checkpoint.config_for(args.size).vision_config.image_size
    pixels = torch.randn(1, 3, side, side).bfloat16()
    tile = fastest(lambda: model.get_image_features(pixel_values=pixels), args.repeats)
    found: dict[str, Any] = {"tile_seconds": round(tile, 4), "prompts": {}}
    lm = model.model.language_model
    matrices = [module for module in lm.modules() if isinstance(module, nn.Linear | Int8Linear)] + [model.lm_head]
    inputs = {module.in_features: torch.randn(1, 1, module.in_features).bfloat16() for module in matrices}
    weights = sum(module.weight.nbytes + getattr(module, "scale", inputs[module.in_features][:0]).nbytes
                  for module in matrices)  # fmt: skip
    text = lm.config
    position = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2
    run = through_generate if arm in ("generate", "transformers") else through_engine
    for length in args.prompts:
        prefills, tokens = [], []
        for _ in range(args.repeats):
            ids = torch.randint(0, 1000, (1, length))
            prefill, seconds = run(model, ids, args.tokens, 1)
            prefills.append(prefill)
            tokens += seconds
        alone = fastest(lambda: [module(inputs[module.in_features]) for module in matrices], 3 * args.repeats)
        found["prompts"][str(length)] = {
            "prefill_tokens_per_second": round(length / min(prefills), 1),
            "decode_tokens_per_second": round(1 / statistics.median(tokens), 2),
            "decode_tokens_per_second_best": round(1 / min(tokens), 2),
            "decode_ms_median": round(1e3 * statistics.median(tokens), 2),
            "decode_ms_min": round(1e3 * min(tokens), 2),
            "matrices_ms": round(1e3 * alone, 2),
            "overhead_ms": round(1e3 * (min(tokens) - alone), 2),
            "bytes_per_token": weights + position * (length + args.tokens // 2),
        }
    if run is through_engine:
        seconds = run(model, torch.randint(0, 1000, (1, args.prompts[0])), args.tokens, ROWS)[1]
        found[f"rows_{ROWS}_tokens_per_second"] = round(ROWS / statistics.median(seconds), 2)
        found[f"rows_{ROWS}_tokens_per_second_best"] = round(ROWS / min(seconds), 2)
    return found


def through_engine(model: Any, ids_1T: torch.Tensor, tokens: int, rows: int) -> tuple[float, list[float]]:
    """Seconds to the first token of a prompt, and of each token after it, as the local engine computes them."""
    length = ids_1T.shape[1]
    cache, ends = BatchCache(rows), torch.tensor([0, length], dtype=torch.int32)
    begin = time.perf_counter()
    with cache.joining([length]) as positions:
        hidden = model.model(
            input_ids=ids_1T, position_ids=positions, past_key_values=cache, use_cache=True, cu_seq_lens_q=ends,
            cu_seq_lens_k=ends, max_length_q=length, max_length_k=length,
        ).last_hidden_state[:, -1]  # fmt: skip
    chosen = model.lm_head(hidden).argmax(-1)
    prefill = time.perf_counter() - begin
    if rows > 1:
        cache.repeat(0, rows - 1)
        chosen = chosen.repeat(rows)
    seconds = []
    for _ in range(tokens):
        begin = time.perf_counter()
        chosen = model.lm_head(decode.decode_step(model, chosen, cache)).argmax(-1)
        seconds.append(time.perf_counter() - begin)
    return prefill, seconds


class Clock(BaseStreamer):
    """The time of each call: the prompt, then every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def through_generate(model: Any, ids_1T: torch.Tensor, tokens: int, rows: int) -> tuple[float, list[float]]:
    """As ``through_engine``, by the library's greedy ``generate``."""
    clock = Clock()
    model.generate(
        input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=tokens + 1, do_sample=False,
        eos_token_id=[], pad_token_id=0, streamer=clock,
    )  # fmt: skip
    gaps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return gaps[0], gaps[1:]


def fastest(work: Callable[[], Any], repeats: int) -> float:
    """Least seconds of ``repeats`` runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def bandwidth(threads: int) -> float:
    """GB/s of reading a buffer that no cache holds."""
    torch.set_num_threads(threads)
    buffer = torch.ones(2**28)
    return buffer.nbytes / fastest(buffer.sum, 10) / 1e9


# ---- all of them --------------------------------------------------------------------------------------------------


def child(arm: str, part: str, args: argparse.Namespace) -> Any:
    """Run this script for one arm and one part, and read the JSON of its last line."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--size", args.size, "--dir", str(args.dir), "--arm", arm,
        "--part", part, "--threads", str(args.threads), "--repeats", str(args.repeats), "--tokens", str(args.tokens),
        "--prompts", *map(str, args.prompts),
    ]  # fmt: skip
    quiet = {
        "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }  # fmt: skip
    # As the command line sets it: threads that wait sleep soon, so a neighbour costs less. The same for every arm.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ, **quiet}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm or 'the benchmark'} ({part}) failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    places = child("", "write", args)  # a process of its own, which gives its memory back
    load_before = os.getloadavg()[0]
    speed = child("", "bandwidth", args)
    arms: dict[str, Any] = {}
    for arm in args.arms:
        print(f"{arm} ...", file=sys.stderr, flush=True)
        arms[arm] = {
            "load": {part: child(arm, part, args) for part in ("cold", "warm")},
            **child(arm, "speed", args),
        }
    speed = max(speed, child("", "bandwidth", args))
    for found in arms.values():
        for prompt in found["prompts"].values():
            floor = prompt["bytes_per_token"] / speed / 1e6
            prompt["floor_ms"] = round(floor, 2)
            prompt["share_of_floor"] = round(floor / prompt["decode_ms_median"], 3)
            prompt["share_of_floor_best"] = round(floor / prompt["decode_ms_min"], 3)
    result = {
        "claim": "decode tokens per second, int8 / bf16, and both against reading the weights and against transformers",
        "size": args.size,
        "bandwidth_gb_per_second": round(speed, 1),
        "weights_gb": round(sum(file.stat().st_size for file in Path(places["sailvl"]).glob("*.safetensors")) / 1e9, 3),
        "arms": arms,
        "ratios": ratios(arms, args.prompts),
        "tokens": args.tokens,
        "repeats": args.repeats,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores, {args.threads} thread(s), "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    return result


def ratios(arms: dict[str, Any], prompts: Sequence[int]) -> dict[str, Any]:
    """What the claims are about; above 1 is in favour of the first."""
    found: dict[str, Any] = {}
    for length in map(str, prompts):
        at = {arm: value["prompts"][length] for arm, value in arms.items()}
        pairs = (("int8", "bf16"), ("int8", "transformers"), ("bf16", "transformers"), ("generate", "transformers"))
        for ours, other in (pair for pair in pairs if at.keys() >= set(pair)):
            for kind in ("prefill_tokens_per_second", "decode_tokens_per_second", "decode_tokens_per_second_best"):
                found[f"{ours} / {other}, {kind}, {length}"] = round(at[ours][kind] / at[other][kind], 3)
    if arms.keys() >= {"bf16", "transformers"}:
        tiles = arms["transformers"]["tile_seconds"] / arms["bf16"]["tile_seconds"]
        found["bf16 / transformers, tiles_per_second"] = round(tiles, 3)
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['size']}, {result['weights_gb']} GB of weights, memory {result['bandwidth_gb_per_second']} GB/s, "
        f"{result['hardware']}, load average {result['load_average']}",
        f"{'arm':14}{'load cold':>10}{'warm':>7}{'peak GB':>9}{'ratio':>7}{'anon.':>7}{'s/tile':>8}{'prompt':>8}"
        f"{'prefill/s':>11}{'decode/s':>10}{'best':>7}{'of floor':>9}{'overhead ms':>13}",
    ]
    for arm, found in result["arms"].items():
        for number, (length, prompt) in enumerate(found["prompts"].items()):
            warm = found["load"]["warm"]
            first = (
                f"{arm:14}{found['load']['cold']['seconds']:10.2f}{warm['seconds']:7.2f}{warm['peak_gb']:9.2f}"
                f"{warm['peak_ratio']:7.2f}{warm['anonymous_peak_gb']:7.2f}{found['tile_seconds']:8.3f}"
            )
            lines.append(
                f"{first if not number else '':62}{length:>8}{prompt['prefill_tokens_per_second']:11.1f}"
                f"{prompt['decode_tokens_per_second']:10.2f}{prompt['decode_tokens_per_second_best']:7.2f}"
                f"{prompt['share_of_floor']:9.2f}{prompt['overhead_ms']:13.1f}"
            )
    rows = {
        arm: f"{found[f'rows_{ROWS}_tokens_per_second']:.1f} (best {found[f'rows_{ROWS}_tokens_per_second_best']:.1f})"
        for arm, found in result["arms"].items()
        if f"rows_{ROWS}_tokens_per_second" in found
    }
    lines.append(f"{ROWS} answers at once, tokens per second: " + ", ".join(f"{k} {v}" for k, v in rows.items()))
    return "\n".join(lines + [f"{name}: {value}" for name, value in result["ratios"].items()])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2b", help="a dense size of the project (nano, 1b, 2b, 8b)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "sailvl-bench",
                        help="folder for the checkpoints (11 GB for 2b); kept, and used again")  # fmt: skip
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--prompts", type=int, nargs="+", default=[300, 1536], help="prompt lengths, in tokens")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded after each prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--arm", default="", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=["write", "cold", "warm", "speed", "bandwidth"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        print(json.dumps(part(args)))
        return
    result = measure(args)
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def part(args: argparse.Namespace) -> Any:
    if args.part == "write":
        return {name: str(folder) for name, folder in folders(args.size, args.dir).items()}
    if args.part == "bandwidth":
        return bandwidth(args.threads)
    folder = args.dir / f"{'internvl' if args.arm == 'transformers' else 'sailvl'}-{args.size}"
    if args.part == "speed":
        return speed_arm(args.arm, folder, args)
    return load_arm(args.arm, folder, args.threads, args.part == "cold")


if __name__ == "__main__":
    main()
