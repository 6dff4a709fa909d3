"""The Hugging Face hub is asked once whether it answers. Its own client asks six times for each file, for half a
minute, before it looks into its cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

TIMEOUT = 5.0  # seconds
_undo: ExitStack | None = None  # inside of `asking`: what its end takes back


@contextmanager
def asking() -> Iterator[None]:
    """Around `no_answer` and what is loaded. What it found holds until the outermost of these blocks ends; then the
    process is online as before, also after an error."""
    global _undo
    if _undo is not None:
        yield
        return
    with ExitStack() as undo:
        _undo = undo
        try:
            yield
        finally:
            _undo = None
            no_answer.cache_clear()


@cache
def no_answer(repo: str, kind: str = "model") -> str | None:
    """Why the hub does not answer about a repository; None where it does, whatever it says.

    Without an answer the rest of the block of `asking` is offline, as with HF_HUB_OFFLINE=1: transformers and datasets
    take what the cache has at once. Raises ValueError for what is no repository's name.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = hf_hub_url(repo, "config.json", repo_type=kind)
    try:
        get_hf_file_metadata(url, timeout=TIMEOUT)
    except HfHubHTTPError:  # an answer; who loads the files names the reason
        return None
    except Exception as error:  # of whatever HTTP library the hub's client has
        assert _undo is not None
        _undo.callback(_set_offline, constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE"))
        _set_offline(True, "1")
        return type(error).__name__
    return None


def _set_offline(offline: bool, variable: str | None) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    os.environ.pop("HF_HUB_OFFLINE", None)
    if variable is not None:
        os.environ["HF_HUB_OFFLINE"] = variable  # peft and child processes
