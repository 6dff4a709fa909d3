"""The Hugging Face hub is asked once whether it answers. Its own client asks six times for each file, for half a
minute, before it looks into its cache."""

from __future__ import annotations

import os
from functools import cache

TIMEOUT = 5.0  # seconds


@cache
def no_answer(repo: str, kind: str = "model") -> str | None:
    """Why the hub does not answer about a repository; None where it does, whatever it says.

    Without an answer the rest of the process is offline, as with HF_HUB_OFFLINE=1: transformers and datasets take what
    the cache has at once. Raises ValueError for what is no repository's name.
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
        os.environ["HF_HUB_OFFLINE"] = "1"  # peft and child processes
        constants.HF_HUB_OFFLINE = True
        return type(error).__name__
    return None
