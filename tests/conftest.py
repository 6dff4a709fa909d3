import functools
import gc
import importlib.metadata
import os

import torch

# Before triton is imported anywhere: without a GPU its kernels run in the interpreter. DeepSpeed, which accelerate
# imports where it is installed, would print a line to stdout about the missing GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"

# accelerate looks packages up at every unwrapping of a model: a quarter of the time of a tiny training run.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def prepare_language_once():
    """The interpreter looks through `triton.language` at every call of a device function, which is most of its time;
    once for each launch and module is enough."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare, launch, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def prepare_once(fn):
        if id(fn.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(fn.__globals__))
        return prepare(fn)

    def launch_anew(self, *args, **kwargs):
        done.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, launch_anew


if os.environ.get("TRITON_INTERPRET") == "1":
    prepare_language_once()


def pytest_collection_finish():
    """Every training run collects garbage: what the imports made need not be looked through again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
