"""The API reference: which modules have a page."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("api_docs", ROOT / "tools" / "api_docs.py")
assert spec is not None and spec.loader is not None
api_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api_docs)


def test_every_public_module_has_a_page_and_no_other():
    found = api_docs.modules()
    assert len(found) == len(set(found))
    assert {"hsd", "hsd_kernels", "hsd.train.trainer", "hsd.methods", "hsd.methods.sdpo", "hsd_kernels.rows"} <= set(
        found
    )
    left_out = {p for package in ("hsd", "hsd_kernels") for p in (ROOT / package).rglob("*.py")}
    for name in found:
        path = ROOT.joinpath(*name.split("."))
        left_out.remove(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
    assert {p for p in left_out if p.parent.name != "child"} == {ROOT / "hsd" / "cli" / "__main__.py"}
