"""What `make` sets up, and what it says before."""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = ["torch setuptools wheel", "--no-build-isolation -e '.[train]'"]


def plan(target: str, folder: Path) -> list[str]:
    """The commands of a target in a new environment."""
    command = ["make", "-n", "--no-print-directory", target, f"VENV={folder}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def installed(commands: list[str]) -> list[str]:
    return [line.partition("constraints.txt ")[2] for line in commands if "pip install" in line]


def test_make_docs_sets_up_the_trainer_and_pdoc_alone(tmp_path):
    commands = plan("docs", tmp_path)
    assert installed(commands) == [*TRAIN, "pdoc"] and commands[-1].endswith("api_docs.py build/docs")


def test_make_demo_says_how_much_it_installs_before_it_does(tmp_path):
    commands = plan("demo", tmp_path)
    assert installed(commands) == TRAIN
    first = next(i for i, line in enumerate(commands) if "pip install" in line)
    said = " ".join(commands[:first])
    assert "0.35 GB to download and 1.6 GB" in said and "2.9 GB and 5.5 GB" in said and "a minute" in said
    (tmp_path / ".train").touch()
    assert not any("GB" in line for line in plan("demo", tmp_path))


def test_torch_brings_the_triton_that_it_was_made_with():
    """With a pin of another one, `pip install -c constraints.txt torch` has no solution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["torch>=2.9"]
    assert not any(line.startswith("triton") for line in (ROOT / "constraints.txt").read_text().splitlines())
