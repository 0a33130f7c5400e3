"""``python -m sailvl`` is the ``sailvl`` command."""

from __future__ import annotations

from sailvl.cli import main

if __name__ == "__main__":
    main()
