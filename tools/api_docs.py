"""The API reference from the docstrings, as a folder of HTML:

make docs        or: python tools/api_docs.py build/docs
"""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path

import hsd
import hsd_kernels

PACKAGES = (hsd_kernels, hsd)
PROGRAMS = "hsd.verify.child."  # run by other processes, which is all that importing one does


def modules() -> list[str]:
    """Every public module of the packages."""
    found = []
    for package in PACKAGES:
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            if not any(part.startswith("_") for part in name.split(".")) and not name.startswith(PROGRAMS):
                found.append(name)
    return found


def main() -> None:
    import pdoc
    import pdoc.render

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    _prepare()
    # A NamedTuple's annotations are evaluated in the wrong module; the page shows them as they are written.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    # A package brings its modules, of which the last patterns leave some out.
    warnings.filterwarnings("ignore", message=r"The module specification|Couldn't import (hsd\.verify\.child|\S+\._)")
    pdoc.render.configure(docformat="google")
    names = modules()
    pdoc.pdoc(*names, f"!{re.escape(PROGRAMS)}", r"!.*\._", output_directory=folder)
    print(f"{folder / 'index.html'}: {len(names)} modules")


def _prepare() -> None:
    """Makes pdoc see what is there and leave out what nobody reads."""
    for name in hsd.__all__:  # it looks into the module's dictionary and does not ask its __getattr__
        setattr(hsd, name, getattr(hsd, name))
    hsd_kernels.__all__.sort(key=str.swapcase)  # functions before the records that they return
    for record in (hsd_kernels.HSDKLOutput, hsd_kernels.RowStats):  # "Alias for field number 0"
        record.__new__.__doc__ = "@private"
        for field in record._fields:
            getattr(record, field).__doc__ = ""
    hsd.HSDConfig.__init__.__doc__ = "@private"  # two screens of TRL's arguments; the fields of its own follow below


if __name__ == "__main__":
    main()
