"""The pure functions of the method run without the training stack, and imports have a direction."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"trl", "transformers", "accelerate", "datasets", "peft", "matplotlib"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import hsd.hindsight.groups, hsd.hindsight.peers, hsd.hindsight.context, hsd.hindsight.credit
import hsd.policy.body_and_head, hsd.train.update, hsd.verify, hsd.train.alarms, hsd.viewer.plots
print(hsd.hindsight.credit.coverage(0.25, 8))
"""


def test_pure_functions_need_neither_trl_nor_transformers():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 0.75 * (1 - 0.75**7)) < 1e-12


def test_the_trainer_is_exported():
    import hsd

    assert hsd.HSDTrainer.__module__ == "hsd.train.trainer" and hsd.HSDConfig.__module__ == "hsd.train.config"


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of ours that a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & modules if inside <= modules else inside & modules | {node.module}
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def room(module: str) -> str:
    """A folder of `hsd`, or another package."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "hsd" else parts[0]


def test_no_module_and_no_room_imports_itself_by_way_of_others():
    assert circle({"a": {"b"}, "b": {"c"}}) == [] and set(circle({"a": {"b"}, "b": {"a"}})) == {"a", "b"}
    files = {}
    for path in (p for package in ("hsd", "hsd_kernels", "benchmarks") for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {name: imports(path, set(files)) - {name} for name, path in files.items()}
    assert circle(graph) == []
    rooms = {}
    for name, imported in graph.items():
        rooms.setdefault(room(name), set()).update(map(room, imported))
    assert circle({name: imported - {name} for name, imported in rooms.items()}) == []
