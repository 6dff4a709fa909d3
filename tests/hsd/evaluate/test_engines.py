"""The choice of engine, and what each is given. vLLM itself does not run here: a stand-in records the calls."""

import sys
from types import SimpleNamespace

import pytest
from tiny_runs import SMALLER, TOKENIZER, qwen3
from transformers import Qwen3ForCausalLM

from hsd.evaluate import engines
from hsd.evaluate.sampling import Sampling

EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = qwen3(0, **SMALLER, bos_token_id=None)
    model.generation_config.eos_token_id = [EOS, 5]
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def pretend(monkeypatch, *, vllm: bool, cuda: bool) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace() if vllm else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)


@pytest.mark.parametrize(
    ("vllm", "cuda", "expected"),
    [(True, True, "vllm"), (True, False, "transformers"), (False, True, "transformers")],
)
def test_auto_takes_vllm_where_it_can_run(monkeypatch, vllm, cuda, expected):
    pretend(monkeypatch, vllm=vllm, cuda=cuda)
    assert engines.choose("auto") == expected


def test_a_named_engine_never_falls_back(monkeypatch):
    pretend(monkeypatch, vllm=False, cuda=True)
    with pytest.raises(ValueError, match="vllm is not installed"):
        engines.choose("vllm")
    with pytest.raises(ValueError, match="vllm is not installed"):
        engines.load_engine("vllm", "anything")
    pretend(monkeypatch, vllm=True, cuda=True)
    assert engines.choose("transformers") == "transformers"
    with pytest.raises(ValueError, match="expected 'auto'"):
        engines.choose("sglang")  # type: ignore[arg-type]


def test_transformers(folder):
    engine = engines.load_engine("transformers", folder, "bfloat16")
    assert engine.name.startswith("transformers ") and "bfloat16" in engine.name
    assert engine.end_ids == sorted([EOS, 5])
    prompts = [TOKENIZER("1+2=")["input_ids"], TOKENIZER("17+2+3=")["input_ids"]]
    sampled = engine.generate(prompts, Sampling(6), 3)
    assert engine.generate(prompts, Sampling(6), 3) == sampled
    assert all(1 <= len(r) <= 6 and not set(r[:-1]) & set(engine.end_ids) for r in sampled)
    greedy = engine.generate(prompts, Sampling(6, temperature=0.0), 3)
    assert engine.generate(prompts, Sampling(6, temperature=0.0), 4) == greedy  # no seed in it
    cold = engine.generate(prompts, Sampling(6, temperature=1e-5), 4)
    assert greedy == cold


@pytest.mark.parametrize("rows", [-1, 0, 3])
def test_a_model_with_fewer_rows_than_tokens_is_refused(folder, tmp_path, rows):
    model = Qwen3ForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(TOKENIZER) + rows, mean_resizing=False)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    if rows >= 0:
        assert engines.load_engine("transformers", str(tmp_path)).end_ids
        return
    said = f"model: expected at least {len(TOKENIZER)} embedding rows, .* got {len(TOKENIZER) - 1} "
    with pytest.raises(ValueError, match=said):
        engines.load_engine("transformers", str(tmp_path))


def test_what_vllm_is_given(folder, monkeypatch):
    given = {}

    class LLM:
        def __init__(self, **kwargs):
            given["llm"] = kwargs

        def generate(self, prompts, settings):
            given["prompts"], given["settings"] = prompts, settings
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(7, 8, EOS))]) for _ in prompts]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **kwargs: kwargs, __version__="0", __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = engines.load_engine("vllm", folder, "bfloat16")
    rollouts = engine.generate([[1, 2], (3,)], Sampling(9, 0.7, 0.9), 100)
    assert rollouts == [[7, 8, EOS], [7, 8, EOS]]
    assert given["llm"] == {"model": folder, "dtype": "bfloat16", "generation_config": "vllm"}
    assert given["prompts"] == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    common = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 9, "stop_token_ids": [5, EOS], "detokenize": False}
    common |= {"stop_token_ids": sorted([5, EOS]), "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert given["settings"] == [common | {"seed": 100}, common | {"seed": 101}]
    assert engine.end_ids == sorted([EOS, 5])
