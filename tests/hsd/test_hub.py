"""The hub is asked once; without an answer the process is offline, and what is cached is still found."""

import http.server
import socket
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_runs import SMALLER, TOKENIZER, qwen3

from hsd.data import load as load_rows
from hsd.hub import no_answer
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


def test_a_silent_hub_is_asked_once_and_the_error_says_what_to_do(silent):
    reason = "which is no folder and not in the hub's cache, and the hub does not answer"
    for call in (pretrained.load, pretrained.load_tokenizer, pretrained.load_config, pretrained.check):
        with pytest.raises(ValueError, match=rf"^model: expected .*, got 'a/b', {reason} \(\w+\); give a folder$"):
            call("a/b")
    with pytest.raises(ValueError, match=r"^data: expected .*, got 'openai/gsm8k': not in the hub's cache, .*OFFLINE"):
        load_rows("gsm8k")
    assert silent == [("a/b", "config.json", "model")] and constants.HF_HUB_OFFLINE


def test_what_is_cached_is_loaded_without_the_hub(silent, tmp_path):
    repo = tmp_path / "cache" / "models--a--b"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("f00")
    qwen3(0, **SMALLER).save_pretrained(repo / "snapshots" / "f00")
    TOKENIZER.save_pretrained(repo / "snapshots" / "f00")
    model, tokenizer = pretrained.load("a/b")
    assert model.config.hidden_size == SMALLER["hidden_size"] and tokenizer("1+1=")["input_ids"]


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
