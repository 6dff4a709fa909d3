"""Each adapter is imported without its host and without the others; the package imports none."""

import subprocess
import sys
from pathlib import Path

import hsd.adapters

NAMES = sorted(p.stem for p in Path(hsd.adapters.__file__).parent.glob("*.py") if p.stem != "__init__")
SCRIPT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"trl", "transformers", "accelerate", "datasets", "peft", "liger_kernel"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import importlib, hsd.adapters
def loaded():
    return {name for name in sys.modules if name.startswith("hsd.adapters.")}
assert not loaded(), loaded()
allowed = {"hsd.adapters.common"}
for name in sys.argv[1:]:
    for module in loaded():
        del sys.modules[module]
    importlib.import_module(f"hsd.adapters.{name}")
    others = loaded() - allowed - {f"hsd.adapters.{name}"}
    assert others <= ({"hsd.adapters.trl"} if name == "trl_context" else set()), (name, others)
"""


def test_each_alone_and_without_its_host():
    assert {"trl", "opsd", "packed", "liger", "cce", "transformers"} <= set(NAMES)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *NAMES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
