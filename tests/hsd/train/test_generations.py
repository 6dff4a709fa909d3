"""The questions of a step, the steps that a generation serves, and what chance does in each generation."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_runs import QUESTIONS, Recorder, make, qwen3

from hsd.hindsight import teacher_prompts
from hsd.hindsight.context import PARTS, ContextTemplate
from hsd.hindsight.peers import GenerationNumbers, peer_rng
from hsd.methods import hsd
from hsd.methods.draw import Ask, Drawn
from hsd.methods.method import Method
from hsd.train import draw
from hsd.train.generations import questions_of, serves_a_multiple


def generations(accumulation, generation, iterations=1):
    """16 questions of 8 rollouts a generation."""
    of_it = {"generation_batch_size": 128, "num_generations": 8, "num_iterations": iterations}
    return SimpleNamespace(gradient_accumulation_steps=accumulation, steps_per_generation=generation, **of_it)


@pytest.mark.parametrize(
    ("args", "questions"),
    [
        (generations(2, 2), 16),
        (generations(2, 4), 8),  # a generation serves two steps
        (generations(2, 2, 2), 8),
        (generations(4, 2), 32),  # a step takes two
        (generations(2, 3), 32 / 3),
        (SimpleNamespace(), None),
    ],
)
def test_the_new_questions_of_a_step(args, questions):
    assert questions_of(args) == pytest.approx(questions)


@pytest.mark.parametrize(
    ("args", "steps", "served"),
    [
        (generations(2, 2), range(12), [0, 5, 10]),
        (generations(2, 4), range(0, 24, 2), [0, 4, 10, 14, 20]),  # the steps 5 and 15 are the second ones of 4 and 14
        (generations(4, 2), range(6), [0, 5]),
    ],
)
def test_every_multiple_is_served_by_a_generation(args, steps, served):
    assert [step for step in steps if serves_a_multiple(step, 5, args)] == served


def test_the_first_generation_of_a_step_has_its_number():
    numbers, later = GenerationNumbers(), 1 << 40
    asked = [(0, True), (0, True), (0, False), (0, True), (1, True), (0, False), (7, False), (7, True), (7, True)]
    found = [numbers.next(step, training=training) for step, training in asked]
    assert found == [0, later, 0, 2 * later, 1, later, 7, 7, 7 + later]


def writing(view):
    if view.group.prompt in [q["prompt"] for q in QUESTIONS]:  # not those of `hsd.methods.reads`
        SEEN.append((view.step, view.rng.random()))
    replies = yield [Ask(view.group.prompt)]
    return Drawn(notes=dict.fromkeys(range(len(view.texts)), replies[0].text))


SEEN = []
WRITING = Method("writing", hsd.contexts, draw=writing, draws_peers=True)
TEMPLATE = ContextTemplate("[{answer}|{demonstration}]", "[{answer}]", parts=dict.fromkeys(PARTS, "|{text}"))
# Two generations a step: two micro-batches, and a generation for each.
TWICE = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "per_device_train_batch_size": 4}


def trainer_of(folder, **options):
    options = {"method": f"{__name__}:WRITING", "max_steps": 2, "teacher": "fixed", "reference_coef": 0.0} | options
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2} | options
    return make(qwen3(initializer_range=0.15), folder, Recorder, template=TEMPLATE, **options)


@pytest.fixture
def keys(monkeypatch):
    """Of every generator that a run makes, in order: by use, (generation, place)."""
    found = {"contexts": [], "draws": []}

    def spy(use):
        def made(seed, generation, place):
            found[use].append((generation, place))
            return peer_rng(seed, generation, place)

        return made

    monkeypatch.setattr(teacher_prompts, "peer_rng", spy("contexts"))
    monkeypatch.setattr(draw, "peer_rng", spy("draws"))
    SEEN.clear()
    return found


def generations_in(places):
    return list(dict.fromkeys(generation for generation, _ in places))


@pytest.mark.parametrize(("options", "expected"), [(TWICE, [0, 1 << 40, 1, 1 + (1 << 40)]), ({}, [0, 1])])
def test_generations_of_one_step_draw_apart(options, expected, keys, tmp_path):
    trainer_of(tmp_path, **options).train()
    for use, places in keys.items():
        assert generations_in(places) == expected and len(set(places)) == len(places), use
    assert [step for step, _ in SEEN] == sorted([0, 1] * 2)  # a group a generation, or two
    assert len({chance for _, chance in SEEN}) == len(SEEN)


@pytest.mark.parametrize("sharing", ["none", "tree"])
def test_a_resumed_run_goes_on_with_the_numbers_of_an_uninterrupted_one(sharing, keys, tmp_path):
    options = {**TWICE, "prefix_sharing": sharing}
    whole = trainer_of(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    uninterrupted = {use: list(places) for use, places in keys.items()}
    trainer_of(tmp_path / "parts", max_steps=2, **options).train()
    for places in keys.values():
        places.clear()
    second = trainer_of(tmp_path / "parts", max_steps=4, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for use, places in keys.items():
        assert places and places == [key for key in uninterrupted[use] if key[0] % (1 << 40) >= 2]
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_of_an_evaluation_draw_apart_and_leave_training_alone(keys, tmp_path):
    held_out = {"eval_dataset": Dataset.from_list(QUESTIONS[:3]), "per_device_eval_batch_size": 4}
    held_out |= {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 4}
    trainer_of(tmp_path / "with", **held_out, **TWICE).train()
    evaluated = [g for g, place in keys["contexts"] if place == 0]  # the first group of each batch
    later = 1 << 40
    assert evaluated == [0, later, 1, 1 + later, 1 + 2 * later, 1, 1 + later, 2, 2 + later, 2 + 2 * later]
