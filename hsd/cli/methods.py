"""``hsd methods``: the family, each with its equation, what it needs and its cost. ``hsd methods NAME``: one of them
in full, with its settings."""

from __future__ import annotations

import argparse
import inspect
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hsd.methods import Method

HELP = "the self-distillation family: equations, what each needs, its cost and settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="show one method in full, also module:METHOD of your own"
    )


def run(args: argparse.Namespace) -> int:
    from hsd.methods import MODULES, method, module_of

    if args.name is None:
        print("\n\n".join(overview(module.METHOD, module) for module in MODULES))
        print(
            "\np: student, q: teacher (no gradient), D_t = log q(o_t) - log p(o_t), A: GRPO's advantage, S: the clipped"
        )
        print("surrogate. `hsd methods NAME` says more; docs/methods.md says what is not of this kind.")
        return 0
    print(in_full(method(args.name), module_of(args.name)))
    return 0


def overview(method: Method, module: ModuleType) -> str:
    from hsd.methods import title

    lines = [
        f"{method.name}: {title(method.name)}",
        *equation(module),
        f"    needs {needs(method)}; forwards: {forwards(method)}",
    ]
    return "\n".join(lines)


def equation(module: ModuleType) -> list[str]:
    """The first indented block of the docstring."""
    found: list[str] = []
    for line in (module.__doc__ or "").splitlines():
        if line.startswith("    ") and line.strip():
            found.append(line)
        elif found:
            break
    return found


def needs(method: Method) -> str:
    from hsd.methods.reads import reads

    read = reads(method)
    found = [f"column {name!r}" for name in method.needs]
    found += [f"column {name!r} (optional)" for name in read.columns if name not in method.needs]
    found += ["peers"] if read.peers else []
    found += ["feedback_fn (optional)"] if method.uses_feedback else []
    found += [f"method_args.{name}" for name in required(method)] + unpublished(method)
    return ", ".join(found) or "prompt and answer"


def required(method: Method) -> list[str]:
    from hsd.methods.method import REQUIRED

    return [name for name, value in method.settings.items() if value is REQUIRED]


def unpublished(method: Method) -> list[str]:
    """Fields of the configuration that the source leaves open."""
    from hsd.methods.method import REQUIRED

    return [name for name, value in method.defaults.items() if value is REQUIRED]


def forwards(method: Method) -> str:
    """Passes through the body for each rollout, before any prefix is shared."""
    from hsd.methods import METHODS

    settings = (METHODS["hsd"].defaults if method.has_teacher else {}) | method.defaults
    contexts = method.max_contexts if method.has_teacher else 0
    trust_region = 2 if settings.get("teacher") == "trust_region" else 1
    read = any(not term.rows for term in method.terms)
    parts = {"student 1 (with gradient)": read, f"teacher {contexts * trust_region}": read and contexts}
    parts[f"scoring {1 + contexts * trust_region}"] = method.scores
    parts[f"extra rows {method.max_rows} (student and teacher, at most)"] = method.max_rows
    parts["what it draws"] = method.draw is not None and method.settings.get("rounds") != 0  # `HSDConfig.draws`
    parts["reference 1"] = settings.get("reference_coef", 0.0) != 0.0
    return " + ".join(name for name, there in parts.items() if there)


def in_full(method: Method, module: ModuleType) -> str:
    from hsd.methods import METHODS

    base = METHODS["hsd"].defaults
    settings = base | method.defaults if method.has_teacher else method.defaults
    lines = [f"method: {method.name}", "", inspect.getdoc(module) or "", ""]
    lines += [f"needs {needs(method)}; forwards: {forwards(method)}", "", "settings (* differs from hsd's):"]
    lines += [f"  {'*' if base.get(k, v) != v or k not in base else ' '} {k}: {v}" for k, v in settings.items()]
    own = [f"    {k}: {v if isinstance(v, str) and v.isprintable() else repr(v)}" for k, v in method.settings.items()]
    lines += ["method_args:", *own] if own else []
    return "\n".join(lines)
