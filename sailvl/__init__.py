"""An open, runnable SAIL-VL2: importing it is free, and afterwards the Auto classes of transformers know the model.

Registration needs torch and transformers' Auto classes, which take a second to load, so it waits until somebody loads
those classes: a finder sees transformers' modules being imported and registers when the outermost of them is complete.
Not earlier, because our classes need modules that may be half-executed at that moment. Where the Auto classes are
loaded already, registration is immediate. The finder removes itself afterwards.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_MODEL_NAMES = (
    "SailViT",
    "SailViTConfig",
    "SailViTImageProcessor",
    "SailVLConfig",
    "SailVLForConditionalGeneration",
    "SailVLImageProcessor",
    "SailVLModel",
    "SailVLMoeForConditionalGeneration",
    "SailVLProcessor",
)
# Every Auto class imports this one.
_AUTO_MODULE = "transformers.models.auto.configuration_auto"


def __getattr__(name: str) -> Any:
    """Model classes on first use: ``sailvl.SailVLConfig``."""
    if name in _MODEL_NAMES:
        return getattr(import_module("sailvl.model"), name)
    raise AttributeError(f"module 'sailvl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODEL_NAMES])


def _register() -> None:
    """Make the Auto classes know the model; a broken torch must not take transformers down with it."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_AwaitAutoClasses"]
    try:
        import_module("sailvl.model")
    except ImportError as error:
        warnings.warn(f"sailvl could not register its model with transformers: {error}", stacklevel=2)


class _AwaitAutoClasses(MetaPathFinder):
    """Calls ``_register`` when the outermost import of a transformers module ends with the Auto classes loaded."""

    def __init__(self) -> None:
        self._local = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" and not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        """Shadow this loader's ``exec_module`` once: the loader itself stays what other tools expect."""
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            self._local.depth = getattr(self._local, "depth", 0) + 1
            try:
                original(module)
            finally:
                self._local.depth -= 1
            if self._local.depth == 0 and _AUTO_MODULE in sys.modules and self in sys.meta_path:
                _register()

        loader.exec_module = exec_module


if _AUTO_MODULE in sys.modules:
    _register()
elif not any(type(finder).__name__ == "_AwaitAutoClasses" for finder in sys.meta_path):
    sys.meta_path.insert(0, _AwaitAutoClasses())
