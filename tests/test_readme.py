"""The README keeps its promises: its commands exist, its links lead somewhere, its figures were measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
SHELL = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line]


def test_is_short_and_shows_the_two_commands_first() -> None:
    lines = TEXT.splitlines()
    assert len(lines) < 200
    assert "make demo" in "\n".join(lines[:40]) and "make test" in "\n".join(lines[:40])


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT))
def test_links_and_pictures_exist(target: str) -> None:
    if not target.startswith("http"):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:sailvl|benchmarks|docs|tools|examples)/[\w./-]+)`", TEXT)))
)
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize("line", SHELL)
def test_commands_exist(line: str) -> None:
    words = line.split()
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words[1:]), line
    elif words[0] == "sailvl":
        command = [sys.executable, "-m", "sailvl", words[1], "--help"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        for option in re.findall(r"--[a-z-]+", line):
            assert option in result.stdout, f"{line}: {option} is not an option"
    else:
        assert words[0] in (".venv/bin/pip", "python", "source", "git"), f"unknown command: {line}"


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
def test_python_compiles_and_its_imports_work(block: str) -> None:
    compile(block, "README.md", "exec")
    imports = "\n".join(line for line in block.splitlines() if re.match(r"(import|from) ", line))
    subprocess.run([sys.executable, "-c", imports], check=True, timeout=120)


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "yaml"])
def test_yaml_recipes_are_valid(block: str, tmp_path: Path) -> None:
    from sailvl.recipes import read

    path = tmp_path / "recipe.yaml"
    path.write_text(block, encoding="utf-8")
    assert yaml.safe_load(block)
    assert read(str(path), []).stages


def test_quoted_figures_are_in_the_results() -> None:
    quoted = re.findall(r"<!-- (\S+\.json) (.+?) -->\s*(-?\d+(?:\.\d+)?)", TEXT)
    assert quoted, "the README quotes no measured figure"
    assert len(quoted) == TEXT.count("<!--"), "a figure is quoted in a form that is not checked"
    for file, key, shown in quoted:
        value = json.loads((ROOT / "benchmarks/results" / file).read_text(encoding="utf-8"))
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        decimals = len(shown.partition(".")[2])
        assert f"{value:.{decimals}f}" == shown, f"{file} {key} is {value}, the README says {shown}"
