"""``import sailvl`` costs nothing, and still the Auto classes of transformers know the model afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KNOWN = """
from transformers import AutoConfig as C, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
config = C.for_model("sailvl", ps_version="v2")
assert type(config).__name__ == "SailVLConfig", type(config)
for mapping in (MODEL_MAPPING, PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING):
    assert type(config) in mapping, mapping
import sys
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_AwaitAutoClasses"]
assert "torchvision" not in sys.modules
import inspect
from transformers import BertConfig
assert "class BertConfig" in inspect.getsource(BertConfig)
"""


def run(code: str) -> str:
    """Run code in a fresh interpreter; its standard output."""
    paths = [path for path in (os.environ.get("PYTHONPATH", ""), str(ROOT)) if path]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:sailvl", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = (
        "[name for name in ('torch', 'transformers', 'numpy', 'PIL', 'pydantic', 'tokenizers') if name in sys.modules]"
    )
    out = run(
        "import time; start = time.perf_counter(); import sailvl; took = time.perf_counter() - start; import sys\n"
        f"assert sailvl.__version__; print(took); assert not {loaded}, {loaded}"
    )
    assert float(out) < 0.2


@pytest.mark.parametrize("module", ["geometry", "types", "config", "curriculum"])
def test_light_modules_load_no_torch(module: str) -> None:
    run(f"import sailvl.{module}, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules")


FAILED_IMPORT = """
try:
    import transformers.no_such_module
except ModuleNotFoundError:
    pass
else:
    raise SystemExit(1)
"""


@pytest.mark.parametrize(
    "first",
    [
        f"import sailvl{FAILED_IMPORT}import transformers; transformers.AutoConfig",
        "from transformers import AutoConfig; import sailvl",
        # Reaches the Auto classes from the middle of importing what our classes need; reloads on both sides of it.
        "import sailvl, importlib; importlib.reload(sailvl); from transformers import Qwen3ForCausalLM; "
        "importlib.reload(sailvl)",
        *[
            pytest.param(code, marks=pytest.mark.slow)
            for code in (
                "import sailvl",
                "import transformers, sailvl",
                "import sailvl; import transformers.modeling_layers",
                "import sailvl; from transformers import AutoTokenizer",
                "import sailvl; from transformers import pipeline",
                "import sailvl; sailvl.SailVLConfig",
                "import sailvl.model.checkpoint",
            )
        ],
    ],
)
def test_every_import_order_registers(first: str) -> None:
    run(first + "\n" + KNOWN)


def test_transformers_stays_lazy_and_intact() -> None:
    run(
        "import sailvl, transformers, sys\n"
        "assert 'sailvl.model' not in sys.modules and 'torch' not in sys.modules\n"
        "import importlib, inspect\n"
        "spec = importlib.import_module('transformers.utils.logging').__spec__\n"
        "assert type(spec.loader).__name__ == 'SourceFileLoader' and 'exec_module' not in vars(spec.loader)\n"
        "assert 'def get_logger' in inspect.getsource(sys.modules['transformers.utils.logging'])\n"
        "try:\n    from transformers import NoSuchThing\nexcept ImportError: pass\nelse: raise SystemExit(1)\n"
    )


def test_unknown_attribute() -> None:
    run(
        "import sailvl\nassert 'SailVLModel' in dir(sailvl)\n"
        "try:\n    sailvl.nothing\nexcept AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit(1)"
    )
