"""The hub is asked once; without an answer what follows is offline, and what is cached is still found."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_runs import SMALLER, TOKENIZER, qwen3

from hsd.cli.__main__ import main
from hsd.data import load as load_rows
from hsd.hub import asking, no_answer
from hsd.policy import pretrained


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    """The state of a fresh process with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    no_answer.cache_clear()
    yield
    no_answer.cache_clear()


@pytest.fixture
def silent(monkeypatch):
    """A hub whose port is closed; the files it was asked for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    asked = []

    def url(*words, **kwargs):
        asked.append((*words, *kwargs.values()))
        return f"http://127.0.0.1:{port}/config.json"

    monkeypatch.setattr(huggingface_hub, "hf_hub_url", url)
    return asked


def test_an_answer_is_one_whatever_it_says(monkeypatch):
    class NotThere(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), NotThere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/config.json"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *words, **kwargs: url)
        assert no_answer("a/b") is None and not constants.HF_HUB_OFFLINE
        server.shutdown()


def offline():
    return constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")


@asking()
def test_a_silent_hub_is_asked_once_and_the_error_says_what_to_do(silent):
    reason = "which is no folder and not in the hub's cache, and the hub does not answer"
    for call in (pretrained.load, pretrained.load_tokenizer, pretrained.load_config, pretrained.check):
        with pytest.raises(ValueError, match=rf"^model: expected .*, got 'a/b', {reason} \(\w+\); give a folder$"):
            call("a/b")
    with pytest.raises(ValueError, match=r"^data: expected .*, got 'openai/gsm8k': not in the hub's cache, .*OFFLINE"):
        load_rows("gsm8k")
    assert silent == [("a/b", "config.json", "model")] and offline() == (True, "1")


@pytest.mark.parametrize("before", [None, "0", "1"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_end_of_the_outermost_block_brings_the_hub_back(silent, before, failing, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if before is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", before)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before == "1")
    was = offline()
    with pytest.raises(KeyError) if failing else nullcontext(), asking():
        with pytest.raises(ZeroDivisionError), asking():
            assert no_answer("a/b") is not None and offline() == (True, "1")
            raise ZeroDivisionError
        assert offline() == (True, "1")
        if failing:
            raise KeyError
    assert offline() == was and len(silent) == (before != "1")
    with asking():
        no_answer("a/b")
    assert len(silent) == 2 * (before != "1")  # the hub may have come back


@pytest.mark.parametrize("call", [pretrained.load, load_rows])
def test_a_load_that_fails_leaves_the_process_online(call, silent):
    with pytest.raises(ValueError, match="hub"):
        call("gsm8k")
    assert offline() == (False, "0") and silent


@pytest.mark.parametrize("fails", [False, True])
def test_a_command_asks_once_and_ends_online(fails, silent, monkeypatch):
    def command(words):
        for path in ("a/b", "a/c"):
            with pytest.raises(ValueError, match="hub does not answer"):
                pretrained.load_config(path)
        if fails:
            raise ValueError
        return 0

    monkeypatch.setattr("hsd.cli.__main__.dispatch", command)
    assert main(["plan"]) == 2 * fails
    assert silent == [("a/b", "config.json", "model")] and offline() == (False, "0")


def test_what_is_cached_is_loaded_without_the_hub(silent, tmp_path):
    repo = tmp_path / "cache" / "models--a--b"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("f00")
    qwen3(0, **SMALLER).save_pretrained(repo / "snapshots" / "f00")
    TOKENIZER.save_pretrained(repo / "snapshots" / "f00")
    model, tokenizer = pretrained.load("a/b")
    assert model.config.hidden_size == SMALLER["hidden_size"] and tokenizer("1+1=")["input_ids"]
    assert silent and offline() == (False, "0")


def test_a_folder_asks_nobody(silent, tmp_path):
    qwen3(0, **SMALLER).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    pretrained.load(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="which is not there"):
        pretrained.load(str(tmp_path / "nowhere"))
    assert not silent


def test_a_missing_base_model_is_named(silent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for base, reason in (("/nowhere/m", "which is not there"), ("a/b", "the hub does not answer")):
        Path("run/adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
        with pytest.raises(ValueError, match=f"got '{base}', the base model of run, .*{reason}"):
            pretrained.load("run")


def test_what_is_no_name_is_not_asked_for():
    with pytest.raises(ValueError, match=r"got 'a/b/c', which is no folder and no hub id: Repo id"):
        pretrained.load_config("a/b/c")


def test_a_library_that_reads_the_switch_once_reads_it_as_it_was():
    """In a process of its own: datasets reads it at its import."""
    code = """
import huggingface_hub
from hsd.data import load
huggingface_hub.hf_hub_url = lambda *words, **kwargs: "http://127.0.0.1:9/config.json"
try:
    load("gsm8k")
except ValueError as error:
    assert "hub" in str(error)
import datasets.config
print(datasets.config.HF_HUB_OFFLINE)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"], done.stderr
