"""What this machine offers: versions, threads, memory, disk and the corpus, each with advice where it falls short.

Nothing is changed and nothing is downloaded. Costs an import of torch, a second or two.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sailvl import __version__

NEEDS: dict[str, tuple[int, ...]] = {
    "torch": (2, 11),
    "transformers": (5, 18),
    "tokenizers": (0, 22),
    "safetensors": (0, 6),
    "numpy": (2,),
    "pillow": (11,),
    "pydantic": (2, 11),
}
"""Lowest versions that the package is built for; the same floors as its metadata."""

IMPORTED_AS = {"pillow": "PIL"}
GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: ``broken`` stops the package from working, ``note`` is worth knowing."""

    name: str
    state: Literal["ok", "note", "broken"]
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything once; a look that fails is a finding, not an error."""
    findings = [_python(), *(_package(name, floor) for name, floor in NEEDS.items())]
    looks: dict[str, Callable[[], Finding]] = {
        "device": _device,
        "threads": _threads,
        "bf16": _bf16,
        "memory": _memory,
        "disk": _disk,
        "corpus": _corpus,
        "tokenizer": _tokenizer,
    }
    for name, look in looks.items():
        try:
            findings.append(look())
        except Exception as error:  # noqa: BLE001  (a broken installation raises anything)
            findings.append(Finding(name=name, state="broken", value=f"{type(error).__name__}: {error}"))
    return findings


def _python() -> Finding:
    return Finding(name="python", state="ok", value=platform.python_version())


def _package(name: str, floor: tuple[int, ...]) -> Finding:
    wanted = ".".join(str(part) for part in floor)
    try:
        version = metadata.version(name)
        importlib.import_module(IMPORTED_AS.get(name, name))
    except metadata.PackageNotFoundError:
        return Finding(name=name, state="broken", value="missing", advice=f"pip install '{name}>={wanted}'")
    except Exception as error:  # noqa: BLE001  (compiled packages fail in many ways)
        text = f"{version}, does not import: {type(error).__name__}: {error}"
        return Finding(
            name=name, state="broken", value=text, advice=f"pip install --force-reinstall '{name}>={wanted}'"
        )
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[: len(floor)] if part.isdecimal())
    if numbers < floor:
        return Finding(name=name, state="broken", value=version, advice=f"pip install '{name}>={wanted}'")
    return Finding(name=name, state="ok", value=version)


def _device() -> Finding:
    import torch  # noqa: PLC0415  (a torch that does not import is a finding)

    if torch.cuda.is_available():
        return Finding(name="device", state="ok", value=f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return Finding(name="device", state="ok", value="CPU (the nano recipe is made for it; larger sizes want a GPU)")


def _threads() -> Finding:
    import torch  # noqa: PLC0415  (a torch that does not import is a finding)

    used = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if used > cores:
        text = f"{used} on {cores} cores: threads wait for each other"
        return Finding(
            name="threads", state="note", value=text, advice=f"set OMP_NUM_THREADS={cores} or --threads {cores}"
        )
    return Finding(name="threads", state="ok", value=f"{used} of {cores} cores")


def _bf16() -> Finding:
    import torch  # noqa: PLC0415  (a torch that does not import is a finding)

    if torch.cuda.is_available():
        fits = torch.cuda.is_bf16_supported()
        return Finding(
            name="bf16", state="ok" if fits else "note", value="GPU: yes" if fits else "GPU: no, fp32 is used"
        )
    flags = _cpu_flags()
    fast = bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)
    return Finding(name="bf16", state="ok", value="CPU: yes" if fast else "CPU: emulated, fp32 is used")


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}


def _memory() -> Finding:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Finding(name="memory", state="note", value="unknown on this system")
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text(encoding="utf-8").strip().isdecimal():
        gib = min(gib, int(limit.read_text(encoding="utf-8")) / GIB)
    if gib < 4:
        return Finding(
            name="memory", state="note", value=f"{gib:.1f} GiB", advice="4 GiB is comfortable; lower max_tokens"
        )
    return Finding(name="memory", state="ok", value=f"{gib:.1f} GiB")


def _disk() -> Finding:
    gib = shutil.disk_usage(Path.cwd()).free / GIB
    if gib < 2:
        return Finding(
            name="disk", state="note", value=f"{gib:.1f} GiB free here", advice="a nano run takes about 2 GiB"
        )
    return Finding(name="disk", state="ok", value=f"{gib:.1f} GiB free here")


def _corpus() -> Finding:
    from sailvl import assets  # noqa: PLC0415  (as torch)

    return Finding(name="corpus", state="ok", value=f"{len(assets.items()):,} pictures")


def _tokenizer() -> Finding:
    from sailvl import assets  # noqa: PLC0415  (as torch)

    path = assets.tokenizer_path()
    if not path.is_file():
        return Finding(name="tokenizer", state="broken", value=f"{path} is missing", advice="reinstall the package")
    return Finding(name="tokenizer", state="ok", value=path.name)


# ---- for done.json -----------------------------------------------------------------------------------------------


def surroundings() -> dict[str, Any]:
    """Hardware, versions and commit: what a number in ``done.json`` needs to be compared."""
    import torch  # noqa: PLC0415  (a torch that does not import is a finding)

    hardware: dict[str, Any] = {"machine": platform.machine(), "cpu": cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        hardware |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    names: Sequence[str] = ("torch", "transformers", "numpy", "pillow")
    versions = {"python": platform.python_version(), "sailvl": __version__} | {name: _version(name) for name in names}
    return {"hardware": hardware, "versions": versions, "commit": _commit(), "finished": time.strftime("%FT%T%z")}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """What this machine's processor is called."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The package's own git commit, when it runs from a checkout (with a + when files differ from it)."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
