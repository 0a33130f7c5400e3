"""How big is the code? Lines per folder, the longest files and the longest functions of the package."""

from __future__ import annotations

import ast
import collections
import statistics
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "sailvl"


def main() -> None:
    folders: collections.Counter[str] = collections.Counter()
    files, functions = [], []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(PACKAGE))
        folders[name.rsplit("/", 1)[0] if "/" in name else "."] += text.count("\n")
        files.append((text.count("\n"), name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                functions.append((node.end_lineno - node.lineno + 1, f"{name}:{node.lineno} {node.name}"))
    for folder, lines in sorted(folders.items()):
        print(f"{lines:6} {folder}")
    lengths = [lines for lines, _ in functions]
    print(f"{sum(folders.values()):6} in {len(files)} files, median {statistics.median(n for n, _ in files):.0f}")
    print("longest files:    ", ", ".join(f"{name} {lines}" for lines, name in sorted(files, reverse=True)[:5]))
    print("longest functions:", ", ".join(f"{name} {lines}" for lines, name in sorted(functions, reverse=True)[:5]))
    print(f"95 % of functions have at most {statistics.quantiles(lengths, n=20)[-1]:.0f} lines")


if __name__ == "__main__":
    main()
