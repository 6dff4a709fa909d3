"""The self-distillation family, one file a method: equation, source, the teacher's context, defaults, own code."""

from importlib import import_module
from types import ModuleType

from hsd.methods.method import Method
from hsd.named import is_named, named, nearest

NAMES = (
    *("hsd", "hsd_unpaired", "opsd", "sdpo", "sdft", "mopd", "atesd", "atesd_learned", "ccopd", "msd"),  # a divergence
    *("step_critique", "rcsd", "opcod", "resd"),  # under a text that a model has written
    *("grpo_opsd", "ssopd", "sdpg", "trace"),  # a divergence beside a policy gradient
    *("rlsd", "egrsd", "cl_egrsd", "rlrt", "rlcsd"),  # the teacher weighs the advantage
    *("antisd", "vopd", "sgsd"),  # the teacher makes the advantage, or the loss of the sampled token
    *("stable_opd", "brts", "mixed_policy", "pbsd", "plan_reference"),  # sequences that are no rollouts
    *("grpo", "dr_grpo", "gspo", "dapo", "actguide", "npo"),  # no teacher
)
MODULES = tuple(import_module(f"{__name__}.{name}") for name in NAMES)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in MODULES}


def method(name: str) -> Method:
    """A member of the family by its name, or a user's own: ``module:METHOD``, a `Method` in a module of theirs."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    if not is_named(name):
        known = f"{', '.join(METHODS)} or module:METHOD{nearest(name, METHODS)}"
        raise ValueError(f"method: expected one of {known}, got {name!r}")
    found = named("method", name)[1]
    if not isinstance(found, Method):
        raise ValueError(f"method: expected a hsd.methods.Method, got {name!r}, which is {found!r:.60}")
    return found


def module_of(name: str) -> ModuleType:
    """Where the method is."""
    if is_named(name):
        return named("method", name)[0]
    return next(module for module in MODULES if module.METHOD.name == name)


def title(name: str) -> str:
    """A method's name in words and, as a rule, its source: the first words of its module's docstring."""
    module = module_of(name)
    words = " ".join((module.__doc__ or name).split("\n\n")[0].split())
    return words.split(": ")[0].rstrip(".:")


__all__ = ["METHODS", "MODULES", "Method", "method", "module_of", "title"]
