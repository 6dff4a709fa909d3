"""The API reference from the docstrings, as a folder of HTML:

make docs        or: python tools/api_docs.py build/docs
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import hsd
import hsd_kernels

MODULES = (
    "hsd_kernels",
    "hsd",
    "hsd.hindsight.groups",
    "hsd.hindsight.peers",
    "hsd.hindsight.context",
    "hsd.hindsight.credit",
    "hsd.policy.forward",
    "hsd.train.update",
    "hsd.methods",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    _prepare()
    # A NamedTuple's annotations are evaluated in the wrong module; the page shows them as they are written.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(f"{folder / 'index.html'}: {', '.join(MODULES)}")


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
