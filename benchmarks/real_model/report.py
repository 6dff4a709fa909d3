from pathlib import Path


def write(folder: Path) -> str:
    return "report: later"
