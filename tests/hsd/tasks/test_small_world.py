import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsd.tasks import small_world
from hsd.tasks.small_world import ANSWER_ONLY, EOS_ID, VOCABULARY, WITH_PEER, Example

QUESTION, SOLUTION = "47+38+25+61=", "47+38=85;85+25=110;110+61=171;#171"


@pytest.fixture(scope="module")
def tokenizer():
    return small_world.build_tokenizer()


def test_tokenizer_is_one_token_per_character(tokenizer):
    text = QUESTION + WITH_PEER.format(answer="171", demonstration=SOLUTION) + SOLUTION + "$"
    ids = tokenizer(text)["input_ids"]
    assert ids == [VOCABULARY.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.batch_decode([[*ids, tokenizer.pad_token_id]], skip_special_tokens=True) == [text[:-1]]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("$", EOS_ID, None)
    assert tokenizer.pad_token_id != EOS_ID and len(tokenizer) == len(VOCABULARY)


@pytest.mark.parametrize("text", ["47 + 38", "4\n", "x", "\u0663"])
def test_tokenizer_rejects_other_characters(tokenizer, text):
    with pytest.raises(Exception, match="UNK"):
        tokenizer(text)


def test_model_and_tokenizer_survive_a_checkpoint(tokenizer, tmp_path):
    model = small_world.build_model(0).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reloaded, again = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    inputs = again(QUESTION + SOLUTION + "$", return_tensors="pt")
    assert again.decode(inputs["input_ids"][0]) == QUESTION + SOLUTION + "$"
    assert inputs["input_ids"][0].tolist() == tokenizer(QUESTION + SOLUTION + "$")["input_ids"]
    assert (again.eos_token_id, again.pad_token_id) == (EOS_ID, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = [m(input_ids=inputs["input_ids"]).logits for m in (model, reloaded)]
    assert torch.equal(*logits)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert reloaded.generation_config.eos_token_id == EOS_ID


def test_model_is_small_and_depends_on_its_seed_alone():
    state = torch.random.get_rng_state()
    models = [small_world.build_model(seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert 0.7e6 < models[0].num_parameters() < 0.9e6 and models[0].dtype == torch.float32
    first, same, other = (m.get_parameter("model.layers.0.mlp.up_proj.weight") for m in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("added", [small_world.TWO_DIGITS, small_world.ONE_DIGIT])
def test_questions_are_distinct_right_and_disjoint(added):
    train, held_out = (small_world.make_questions(500, seed=0, held_out=side, added=added) for side in (False, True))
    assert train == small_world.make_questions(500, seed=0, added=added)
    assert train != small_world.make_questions(500, seed=1, added=added)
    prompts = {q["prompt"] for q in train}
    assert len(prompts) == 500 and not prompts & {q["prompt"] for q in held_out}
    for question in train + held_out:
        numbers = [int(n) for n in question["prompt"].removesuffix("=").split("+")]
        assert len(numbers) == 4 and 10 <= numbers[0] <= 99 and all(added[0] <= n <= added[1] for n in numbers[1:])
        assert question["answer"] == str(sum(numbers))
    with pytest.raises(ValueError, match="n: expected a number of questions >= 0, got -1"):
        small_world.make_questions(-1, seed=0)


def test_all_questions_of_a_side_can_be_asked_for_and_not_one_more():
    options = {"seed": 0, "terms": 2, "added": (2, 3)}  # 90 x 2
    sides = [[q for q in range(181) if _can_be_made(q, held_out=side, **options)] for side in (False, True)]
    most = [side[-1] for side in sides]
    assert sum(most) == 180 and [side == list(range(n + 1)) for side, n in zip(sides, most, strict=True)] == [True] * 2
    with pytest.raises(ValueError, match=f"^n: expected at most {most[1]}, .*, got {most[1] + 1}$"):
        small_world.make_questions(most[1] + 1, held_out=True, **options)


def _can_be_made(n, **options):
    try:
        return len({q["prompt"] for q in small_world.make_questions(n, **options)}) == n
    except ValueError:
        return False


def test_warm_start_never_draws_a_held_out_question():
    rng = random.Random(0)
    assert not any(small_world.is_held_out(small_world.draw_example(rng).prompt[:12]) for _ in range(300))
    assert all(small_world.is_held_out(q["prompt"]) for q in small_world.make_questions(50, seed=0, held_out=True))


def test_solution_without_slips():
    text, tens = small_world.solve([47, 38, 25, 61], random.Random(0), slip_rate=0.0)
    assert text == SOLUTION
    assert tens == {6: ("8", ["7", "9"]), 16: ("1", ["0", "2"]), 27: ("7", ["6", "8"])}


def test_slips_move_a_tens_digit_and_propagate():
    text, tens = small_world.solve([10, 10, 10, 75], random.Random(0), slip_rate=1.0)
    steps = text.split(";")
    assert steps[0] in ("10+10=10", "10+10=30")
    for before, after in itertools.pairwise(steps):
        assert after.removeprefix("#").split("+")[0] == before.split("=")[1]
    assert all(text[index] in wrong and text[index] != right for index, (right, wrong) in tens.items())


def test_slip_rate():
    rng = random.Random(0)
    solved = [small_world.solve([47, 38, 25, 61], rng, slip_rate=0.3) for _ in range(1000)]
    slips = sum(text[index] != right for text, tens in solved for index, (right, _) in tens.items())
    assert 0.27 < slips / 3000 < 0.33


def test_targets_by_hand(tokenizer):
    example = Example("1+2=[3]", "4;$", {0: {"3": 0.7, "4": 0.3}})
    input_ids, targets = small_world.encode_examples([example, Example("=", "1$", {})], tokenizer)
    assert tokenizer.decode(input_ids[0]) == "1+2=[3]4;$" and tokenizer.decode(input_ids[1][:3]) == "=1$"
    expected = torch.zeros(2, 10, len(VOCABULARY))
    expected[0, 7, VOCABULARY.index("3")], expected[0, 7, VOCABULARY.index("4")] = 0.7, 0.3
    expected[0, 8, VOCABULARY.index(";")] = expected[0, 9, EOS_ID] = 1
    expected[1, 1, VOCABULARY.index("1")] = expected[1, 2, EOS_ID] = 1
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("added", [small_world.TWO_DIGITS, small_world.ONE_DIGIT])
def test_a_slip_in_context_is_trained_towards_the_right_digit_and_on_from_the_wrong_one(added):
    rng, kinds = random.Random(0), {"plain": 0, "answer": 0, "peer": 0}
    for _ in range(500):
        example = small_world.draw_example(rng, added=added)
        question, equals, context = example.prompt.partition("=")
        question += equals
        answer = str(sum(int(n) for n in question[:-1].split("+")))
        kind = "peer" if "|" in context else "answer" if context else "plain"
        kinds[kind] += 1
        if kind == "answer":
            assert context == ANSWER_ONLY.format(answer=answer)
        if kind == "peer":
            demonstration = context[1:-1].split("|")[1]
            assert context == WITH_PEER.format(answer=answer, demonstration=demonstration)
            assert all(eval(step.replace("=", "==")) for step in demonstration.split(";")[:-1])
        assert example.solution.endswith("$") and len(example.solution) <= small_world.MAX_COMPLETION
        start = 0
        for step in example.solution.split(";")[:-1]:
            # Each step adds to the number the solution has, and targets the true sum of that.
            terms, result = step.split("=")
            place = start + len(terms) + 1 + len(result) - 2
            target = example.targets[place]
            right = str(eval(terms))[-2]
            assert target[right] == (1.0 if kind == "peer" else 0.7)
            assert sum(target.values()) == pytest.approx(1) and target.get(example.solution[place]) is not None
            start += len(step) + 1
        assert len(example.targets) == 3
    assert 0.3 < kinds["plain"] / 500 < 0.5 and 0.1 < kinds["answer"] / 500 < 0.3


def test_a_few_steps_lower_the_loss_and_repeat(tokenizer):
    runs, seen = [], []
    for _ in range(2):
        model = small_world.build_model(0)
        losses = small_world.warm_start(
            model,
            tokenizer,
            seed=0,
            steps=10,
            batch_size=4,
            progress=lambda done, steps: seen.append((done, steps)),
        )
        runs.append(losses)
    assert runs[0] == runs[1] and seen == 2 * [(done, 10) for done in range(1, 11)]
    assert runs[0][-1] < runs[0][0] - 0.3
    with pytest.raises(ValueError, match="expected positive integers, got 0 and 4"):
        small_world.warm_start(small_world.build_model(0), tokenizer, seed=0, steps=0, batch_size=4)


def test_demonstrations_are_trained_where_they_are_asked_for(tokenizer):
    rng, peers = random.Random(0), 0
    for _ in range(50):
        state = rng.getstate()
        plain = small_world.draw_example(rng)
        rng.setstate(state)
        example = small_world.draw_example(rng, demonstrations=True)
        assert (example.prompt, example.solution, plain.context) == (plain.prompt, plain.solution, 0)
        text = example.prompt[len(example.prompt) - example.context :]
        assert text == (example.prompt.partition("|")[2] if "|" in example.prompt else "")
        peers += bool(text)
        trained = small_world.encode_examples([example], tokenizer)[1].sum(-1)[0]
        assert trained.sum() == pytest.approx(example.context + len(example.solution))
        assert trained[: len(example.prompt) - example.context].sum() == 0
    assert 10 < peers < 30


def test_a_stopped_warm_start_goes_on_with_the_same_numbers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(small_world, "SAVE_EVERY", 4)
    state, settings = tmp_path / "state", {"seed": 0, "steps": 10, "batch_size": 2}

    def stop(done, steps):
        if done == 6:
            raise KeyboardInterrupt

    whole, stopped, resumed = (small_world.build_model(0) for _ in range(3))
    losses = small_world.warm_start(whole, tokenizer, **settings)
    with pytest.raises(KeyboardInterrupt):
        small_world.warm_start(stopped, tokenizer, **settings, state=state, progress=stop)
    seen = []
    again = small_world.warm_start(
        resumed, tokenizer, **settings, state=state, progress=lambda done, steps: seen.append(done)
    )
    assert again == losses and seen == list(range(5, 11))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_demo_s_warm_start_is_made_once_and_leaves_no_state(tmp_path, monkeypatch):
    monkeypatch.setattr(small_world, "CACHE", tmp_path)
    monkeypatch.setattr(small_world, "SAVE_EVERY", 1)
    monkeypatch.setattr(small_world, "WARM_STEPS", 2)
    folder = small_world.warm_started(0)
    assert [p.name for p in tmp_path.iterdir()] == [Path(folder).name]
    monkeypatch.setattr(small_world, "warm_start", lambda *args, **kwargs: pytest.fail("made again"))
    assert small_world.warm_started(0) == folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SOLUTION, 1.0),
        (SOLUTION + "$", 1.0),
        ("#171", 1.0),
        (SOLUTION + "$$", 0.0),
        ("##171", 0.0),
        ("#171#171", 0.0),
        ("#12;#171", 0.0),
        ("#171;", 0.0),
        ("# 171", 0.0),
        ("#171\n", 0.0),
        ("#0171", 0.0),
        ("#+171", 0.0),
        ("#\u0661\u0667\u0661", 0.0),
        ("#17", 0.0),
        ("171", 0.0),
        ("#", 0.0),
        ("", 0.0),
    ],
)
def test_reward_on_hostile_strings(text, expected):
    assert small_world.reward([text], ["171"]) == [expected]


def test_reward_asks_for_the_eos_where_it_can_see_it():
    completions, answers = ["#171"] * 4, ["171"] * 4
    ids = [VOCABULARY.index(character) for character in "#171"]
    seen = [[*ids, EOS_ID], ids, [], [EOS_ID, *ids]]
    assert small_world.reward(completions, answers, completion_ids=seen, prompts=["?"] * 4) == [1, 0, 0, 0]


def test_reward_names_what_is_wrong():
    with pytest.raises(ValueError, match="answer: expected 2 entries, got 1"):
        small_world.reward(["#1", "#2"], ["1"])
    with pytest.raises(ValueError, match="completion_ids: expected 1 entries, got 0"):
        small_world.reward(["#1"], ["1"], completion_ids=[])
