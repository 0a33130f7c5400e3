from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sailvl.lock import LockedError, lock


def test_a_lock_is_held_released_and_taken_over(tmp_path: Path) -> None:
    with lock(tmp_path):
        owner = json.loads((tmp_path / ".lock").read_text(encoding="utf-8"))
        assert owner["pid"] == os.getpid()
        with pytest.raises(LockedError, match="is running this folder"), lock(tmp_path):
            pass
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        _ = 1 / 0
    stranger = {**owner, "born": "7"}  # the process id was used again
    for content in ("", "torn{", json.dumps(stranger), json.dumps({**owner, "pid": 2**22 + 1})):
        (tmp_path / ".lock").write_text(content, encoding="utf-8")
        with lock(tmp_path):
            pass
    (tmp_path / ".lock").write_text(json.dumps({**owner, "host": "elsewhere"}), encoding="utf-8")
    with pytest.raises(LockedError, match="elsewhere"), lock(tmp_path):
        pass


LOCKER = """
import sys
from pathlib import Path
from sailvl.lock import LockedError, lock
try:
    with lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except LockedError:
    print("no")
"""


def test_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"host": "x", "pid": 1', encoding="utf-8")
    args = [sys.executable, "-c", LOCKER, str(tmp_path)]
    many = [subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    first = [process.stdout.readline().strip() for process in many if process.stdout]
    for process in many:
        process.communicate()
    assert sorted(first) == ["held", "no", "no", "no"]
