"""A method's draw: texts, other rollouts and extra rows, through the trainer, and its pure half alone."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny_runs import ACCUMULATED, LORA, QUESTIONS, TOKENIZER, Recorder, make, qwen3

from hsd.hindsight.context import PARTS, ContextTemplate, extended
from hsd.hindsight.groups import Group, Rollout
from hsd.methods import METHODS
from hsd.methods.draw import Ask, Drawn, GroupView, Reply, converse, gives_away
from hsd.methods.trace import step_of_tokens
from hsd.train.alarms import alarms
from hsd.train.callbacks import load_metrics
from hsd.train.draw import Writer

SHORT = dict.fromkeys(PARTS, "|{text}")
TEMPLATE = ContextTemplate("[{answer}|{demonstration}]", "[{answer}]", "[|{demonstration}]", "[{feedback}]", SHORT, "]")
ROWS = [{**q, "solution": f"{i}+{i}=\n{i}", "rubric": f"{i}", "trajectory": f"{i}#"} for i, q in enumerate(QUESTIONS)]
ROWS = [{**r, "solution": r["solution"].replace("\n", ";")} for r in ROWS]
# The vocabulary of 21 characters has none of the wordings.
GIVEN = {
    "step_critique": {"ask": "[{solution}|{attempt}"},
    "rcsd": {"ask": "[{answer}|{rubric}"},
    "opcod": {"ask": "[{attempt}"},
    "resd": {"ask": "[{attempt}{feedback}"},
    "trace": {
        "ask": "[{attempt}",
        "separator": "+",
        "step": ";{n}={step}",
        "tag_key": "1",
        "tag_error": "0",
        "most": 0.9,
        "mu_error": 1.0,
    },
    "stable_opd": {"gold": 0.5},
    "brts": {"trajectories": 2},
    "mixed_policy": {"ask": "[{attempt}", "which": "all"},
    "plan_reference": {"ask": "[{solution}"},
    "pbsd": {"beta": 0.3},
    "npo": {"gate": 0.6},
    "actguide": {"plan": "[{text}"},
    "dapo": {"rounds": 2},
    "atesd_learned": {"window": 1, "horizon": 1, "discount": 0.9, "rate": 0.5},
}
MORE = {"stable_opd": {"reference_coef": 0.1}}


def third(completion_ids, **kwargs):
    """By the tokens alone: about half of the rollouts, so that a redrawn one is judged like any other."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def ninth(completion_ids, **kwargs):
    """So few that a group has none, and another one under a plan or of another question has some."""
    return [float(sum(ids) % 9 == 0) for ids in completion_ids]


def hard(completion_ids, prompts, **kwargs):
    """Groups of the first questions are all wrong, but behind their own prompts only texts count."""
    return [float(sum(ids) % 5 == 0 and len(p) % 2 == 0) for ids, p in zip(completion_ids, prompts, strict=True)]


def trainer_of(folder, method, reward=third, **options):
    args = {"method": method, "method_args": GIVEN.get(method), **MORE.get(method, {})}
    if METHODS[method].has_teacher:
        args |= {"teacher": "fixed"} if method != "trace" else {}
    model = qwen3(initializer_range=0.15)
    return make(model, folder, Recorder, reward, ROWS, TEMPLATE, **args | options)


def step_of(trainer):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return loss, [a - b.detach() for a, b in zip(before, trainer.model.parameters(), strict=True)]


@pytest.mark.parametrize("method", GIVEN)
def test_accumulation_and_the_tree_change_nothing(method, tmp_path):
    reward = {"actguide": ninth, "dapo": ninth, "plan_reference": hard}.get(method, third)
    first = trainer_of(tmp_path / "a", method, reward, prefix_sharing="none")
    loss, moved = step_of(first)
    (log,) = (row for row in first.state.log_history if "loss" in row)
    assert (log.get("hsd/drawn_replaced", 0.0) > 0) is (method in ("actguide", "dapo", "npo"))
    assert (log.get("hsd/drawn_rows", 0.0) > 0) is (METHODS[method].max_rows > 0)
    scale = max(g.abs().max() for g in moved).item()
    assert scale > 1e-5
    ways = {"parts": {"prefix_sharing": "none", **ACCUMULATED}}
    ways["tree"] = {"prefix_sharing": "tree"}
    if METHODS[method].max_rows < 2:  # else it is refused
        ways["tree, in chunks"] = {"prefix_sharing": "tree", "tree_token_budget": 40}
    for name, options in ways.items():
        other_loss, other = step_of(trainer_of(tmp_path / name, method, reward, **options))
        assert other_loss == pytest.approx(loss, rel=1e-3, abs=1e-6), name
        for a, b in zip(moved, other, strict=True):
            torch.testing.assert_close(b, a, rtol=5e-3, atol=5e-5 * scale, msg=name)


@pytest.mark.parametrize("method", ["opcod", "atesd_learned", "dapo", "pbsd", "resd", "trace"])
def test_a_resumed_run_is_the_uninterrupted_one(method, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = trainer_of(tmp_path / "whole", method, max_steps=4, **options)
    whole.train()
    trainer_of(tmp_path / "parts", method, max_steps=3, **options).train()  # one step more than the checkpoint has
    second = trainer_of(tmp_path / "parts", method, max_steps=4, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.method_state == second.method_state
    if METHODS[method].draw is not None:
        texts = [(tmp_path / run / "texts.jsonl").read_text() for run in ("whole", "parts")]
        assert texts[0] == texts[1]
        assert {row["step"] for row in load_metrics(tmp_path / "whole" / "texts.jsonl")} <= {1, 2, 3, 4}


def ids_of(batch):
    return [x[m.bool()].tolist() for x, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]


def never(completion_ids, **kwargs):
    return [0.0] * len(completion_ids)


def behind_a_plan(completion_ids, completions, **kwargs):
    """0 for the first eight, which are the plain rollouts; the asks come in later calls."""
    behind_a_plan.calls += 1
    kwargs["log_extra"]("call", [behind_a_plan.calls] * len(completion_ids))
    return [0.0 if behind_a_plan.calls == 1 else 1.0] * len(completion_ids)


def test_a_group_without_a_reward_is_drawn_again_under_a_plan(tmp_path):
    behind_a_plan.calls = 0
    rows = [{**r, "solution": f"{i}="} for i, r in enumerate(ROWS)]  # one step each, so that its plan is known
    args = {"method": "actguide", "method_args": GIVEN["actguide"], "prefix_sharing": "none"}
    trainer = make(qwen3(initializer_range=0.15), tmp_path, Recorder, behind_a_plan, rows, TEMPLATE, **args)
    trainer.train()
    (batch,) = trainer.batches
    texts = load_metrics(tmp_path / "texts.jsonl")
    redrawn = [t["text"] for t in texts if t["group"] == 0][2:], [t["text"] for t in texts if t["group"] == 1][2:]
    seen = [TOKENIZER.decode(x, skip_special_tokens=True) for x in ids_of(batch)]
    assert sorted(seen) == sorted([*redrawn[0], *redrawn[1]]) and len(seen) == 8
    assert batch["success"].all()
    # TRL's table: the replies that took the rollouts' place, and what was logged of the rollouts alone.
    assert sorted(trainer._logs["completion"]) == sorted(seen) and list(trainer._logs["extra"]["call"]) == [1] * 8
    (log,) = (row for row in trainer.state.log_history if "loss" in row)
    assert log["hsd/success_before_draw"] == 0.0 and log["hsd/success_rate"] == log["hsd/drawn_replaced"] == 1.0
    # The old policy is the one behind the plan.
    model = qwen3(initializer_range=0.15).eval()
    questions = TOKENIZER.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    for q, ids, old in zip(questions, ids_of(batch), batch["old_per_token_logps"], strict=True):
        solution = next(r["solution"] for r in rows if r["prompt"] == q)
        prompt = TOKENIZER(q + "[" + solution)["input_ids"]
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(old[: len(ids)], expected, rtol=1e-4, atol=1e-4)


def test_guidance_without_a_hard_group_is_the_plain_surrogate(tmp_path):
    easy = lambda completion_ids, **kw: [float(i % 2) for i in range(len(completion_ids))]  # noqa: E731
    free = {"reference_coef": 0.0, "delta": 3.0, "loss_type": "dapo"}
    seen = []
    for method in ("actguide", "grpo"):
        trainer = trainer_of(tmp_path / method, method, easy, **free)
        seen.append((step_of(trainer)[0], ids_of(trainer.batches[0])))
    assert seen[0] == seen[1] and seen[0][0] != 0.0


def test_an_equal_group_gives_way_to_an_unequal_one_of_another_question(tmp_path):
    def reward(completion_ids, **kw):
        reward.calls += 1
        return [0.0 if reward.calls == 1 else float(i % 2) for i in range(len(completion_ids))]

    reward.calls = 0
    a = trainer_of(tmp_path / "a", "dapo", reward)
    a.train()
    b = trainer_of(tmp_path / "b", "grpo", never)
    b.train()
    questions = [TOKENIZER.batch_decode(t.batches[0]["prompt_ids"], skip_special_tokens=True) for t in (a, b)]
    assert questions[0] != questions[1] and len(set(questions[0])) <= 2
    for g in (range(4), range(4, 8)):
        assert len({questions[0][i] for i in g}) == 1
    assert a.batches[0]["success"].float().mean() == 0.5
    assert not torch.equal(a.batches[0]["advantages"], b.batches[0]["advantages"])


@pytest.mark.parametrize(("right", "gate", "taken"), [(True, 0.6, True), (True, 0.0, False), (False, 0.6, False)])
def test_a_slot_is_taken_by_a_verified_trajectory_of_a_weak_group(right, gate, taken, tmp_path):
    def reward(completion_ids, completions, **kw):
        return [float(right if "#" in c and len(c) == 2 else i % 4 == 0) for i, c in enumerate(completions)]

    a = trainer_of(tmp_path, "npo", reward, method_args={"gate": gate}, prefix_sharing="none")
    a.train()
    (batch,) = a.batches
    texts = [TOKENIZER.decode(x, skip_special_tokens=True) for x in ids_of(batch)]
    given = [i for i, t in enumerate(texts) if len(t) == 2 and t.endswith("#")]
    assert len(given) == (2 if taken else 0)
    assert "old_per_token_logps" not in batch  # a ratio of 1


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("peft_config", [None, LORA])
@pytest.mark.parametrize(
    ("method", "teacher"),  # that writes: the teacher in brts, the policy in resd
    [("brts", "fixed"), ("brts", "ema"), ("brts", "live"), ("resd", "ema")],
)
def test_texts_are_sampled_in_the_rollouts_precision(method, teacher, peft_config, bf16, tmp_path):
    trainer = trainer_of(tmp_path, method, bf16=bf16, peft_config=peft_config, teacher=teacher)
    logits = []

    def hook(module, _, out):
        if isinstance(module, torch.nn.Linear) and out.shape[-1] == len(TOKENIZER):
            logits.append(out.dtype)

    sampled, sample = [], trainer.writer.sample
    trainer.writer = replace(trainer.writer, sample=lambda *a: (sampled.append(len(logits)), sample(*a))[1])
    with torch.nn.modules.module.register_module_forward_hook(hook):
        trainer.train()
    assert 0 < sampled[0] < len(logits)  # rollouts, then texts
    assert set(logits) == {torch.bfloat16 if bf16 else torch.float32}


def test_texts_reach_the_teacher_and_leaks_do_not(tmp_path):
    said = iter(["7", "[1]", "", "9#"] * 8)
    wrote = []

    def writer(prompts):
        wrote.extend(prompts)
        return [next(said) for _ in prompts]

    a = trainer_of(tmp_path / "a", "step_critique", writer_fn=writer)
    a.train()
    (batch,) = a.batches
    shown = [TOKENIZER.decode(x, skip_special_tokens=True) for x in batch["teacher_prompt_ids"]]
    assert len(wrote) == 8 and sum(t.endswith("|7]") for t in shown) == 2 and batch["has_context"].sum() == 6
    (log,) = (row for row in a.state.log_history if "loss" in row)
    assert log["hsd/drawn_empty"] == 0.25 and log["hsd/drawn_asks"] == 8

    answers = {r["prompt"]: r["answer"] for r in ROWS}
    tell = lambda prompts: [f"#{answers[p.split('[')[0]]}" for p in prompts]  # noqa: E731
    b = trainer_of(tmp_path / "b", "opcod", never, writer_fn=tell)
    b.train()
    (log,) = (row for row in b.state.log_history if "loss" in row)
    assert log["hsd/drawn_leaks"] == 1.0 and not b.batches[0]["has_context"].any()


def test_a_writer_is_refused_where_nothing_is_drawn_and_must_answer_each(tmp_path):
    with pytest.raises(ValueError, match=r"^writer_fn: expected None with method='hsd'"):
        trainer_of(tmp_path, "hsd", writer_fn=lambda prompts: prompts)
    with pytest.raises(ValueError, match=r"^writer_fn: expected 8 texts, one a prompt, got 1"):
        trainer_of(tmp_path, "step_critique", writer_fn=lambda prompts: ["1"]).train()
    with pytest.raises(ValueError, match=r"^draw_cap: expected None with method='hsd', which draws nothing"):
        trainer_of(tmp_path, "hsd", draw_cap=3)
    with pytest.raises(ValueError, match=r"^tree_token_budget: expected None with method='pbsd'"):
        trainer_of(tmp_path, "pbsd", tree_token_budget=40)


def test_a_rewrite_teaches_the_policy_that_wrote_it(tmp_path):
    """The teacher has the student's weights: only what it reads before the rewrite can make a difference."""
    a = trainer_of(tmp_path, "mixed_policy")
    start = [p.detach().clone() for p in a.model.parameters()]
    a.train()
    assert max((x - y).abs().max().item() for x, y in zip(start, a.model.parameters(), strict=True)) > 1e-3
    (batch,) = a.batches
    questions, texts = (
        TOKENIZER.batch_decode(batch[k], skip_special_tokens=True) for k in ("prompt_ids", "completion_ids")
    )
    there = batch["rows/mask"].any(-1)[:, 0]
    assert there.sum() >= 4
    for i in there.nonzero()[:, 0].tolist():
        read = TOKENIZER.decode(batch["rows/teacher_ids"][i, 0, 0], skip_special_tokens=True)
        assert read == f"{questions[i]}[{texts[i]}"


# -- the pure half -----------------------------------------------------------------------------------------------------


def test_ranks_hear_the_same_of_a_writer_that_says_something_else_on_each():
    barrier, parts = threading.Barrier(2), [[], []]

    def replies(rank):
        def gather(mine):
            parts[rank] = mine
            barrier.wait(60)
            return parts[0] + parts[1]

        def write(prompts):
            return [f"{rank}{i}" for i in range(len(prompts))]

        writer = Writer(TOKENIZER, tuple, None, None, None, gather, rank, 2, write)
        return writer([(0, Ask("q"))] * 3, [], 0)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(replies, (0, 1))
    assert first == second and [reply.text for reply in first] == ["00", "01", "10"]


def talk(rounds, size=1):
    def run():
        heard = []
        for n in range(rounds):
            heard += yield [Ask(f"{n}")] * size
        return Drawn(notes=dict(enumerate(r.text for r in heard)))

    return run()


def echo(asked, number):
    return [Reply(f"{n}:{ask.prompt}:{number}", ()) for n, ask in asked]


def test_groups_are_asked_in_rounds_and_told_their_own():
    out = converse([talk(2), talk(0), talk(1, 2)], echo, 100)
    assert [d.notes for d in out.drawn] == [{0: "0:0:0", 1: "0:1:1"}, {}, {0: "2:0:0", 1: "2:0:0"}]
    assert [n for n, _, _ in out.log] == [0, 2, 2, 0] and out.dropped == 0


@pytest.mark.parametrize(("cap", "dropped", "asked"), [(3, 0, 3), (2, 1, 2), (1, 1, 1)])
def test_a_group_over_the_cap_goes_without(cap, dropped, asked):
    out = converse([talk(1), talk(1, 2)] if cap != 1 else [talk(2)], echo, cap)
    assert (out.dropped, len(out.log)) == (dropped, asked if cap != 2 else 1)
    assert cap == 3 or out.drawn[-1] == Drawn()


def test_a_draw_that_never_ends_does():
    def run():
        while True:
            yield []

    assert converse([run()], echo, 5).dropped == 1


@pytest.mark.parametrize(
    ("text", "answer", "told"),
    [
        ("so 12 it is", "12", True),
        ("#12", "12", True),
        ("$12", "12", True),
        ("12.", "12", True),
        ("12, then", "12", True),
        ("Take 12.Then", "12", True),
        ("so: 2.5", "2.5", True),
        ("it is 1/5!", "1/5", True),
        ("so,12", "12", True),
        ("112", "12", False),
        ("x12", "12", False),
        ("2.12", "12", False),
        ("12.5", "12", False),
        ("12,000", "12", False),
        ("1,012", "12", False),
        ("1/12", "12", False),
        ("12/5", "12", False),
        (r"\frac{1}{12}", "12", False),
        (r"\dfrac{1}{12}", "1/12", True),
        ("so .12", "12", False),
        (".12", "12", False),
        ("see ...12", "12", True),
        ("-12", "12", False),
        (r"\boxed{-12}", "12", False),
        ("it is \N{MINUS SIGN}12", "12", False),
        ("it is \N{MINUS SIGN}12", "-12", True),
        ("x=-12", "-12", True),
        ("20-12", "12", True),
        ("20-12", "-12", False),
        ("-Paris", "Paris", True),
        ("1,234,567", "1234567", True),
        ("1,234,567", "234", False),
        ("12000", "12,000", True),
        ("12.00.", "12", True),
        ("12.0.1", "12", False),
        ("2.50", "2.5", True),
        ("2.505", "2.5", False),
        ("2", "2.0", True),
        ("x", " ", False),
        ("x", None, False),
        ("x", [], False),
        ("it is 7", ["12", "7"], True),
        ("it is 7", ["12", "", None], False),
        ("it is 7", 7, True),
    ],
)
def test_what_gives_an_answer_away(text, answer, told):
    assert gives_away(text, answer) is told


def test_words_go_to_the_end_of_a_question():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert extended("q", "!") == "q!" and extended(chat, "!")[1]["content"] == "q!" and chat[1]["content"] == "q"


def test_a_separator_ends_its_own_step():
    assert step_of_tokens(["a", ";", "b;c", "d"], ";") == [0, 0, 1, 2]


def test_the_shortest_success():
    group = Group("q", "a", tuple(Rollout((1,) * n, r) for n, r in ((3, 1.0), (1, 0.0), (2, 1.0), (2, 1.0))))
    view = GroupView(group, {}, [""] * 4, lambda i: [], [None] * 4, random.Random(0))
    assert view.shortest_success == 2


@pytest.mark.parametrize(("name", "calm", "alarming"), [("drawn_empty", 0.5, 0.6), ("drawn_leaks", 0.1, 0.2)])
def test_empty_and_leaking_texts_are_alarms(name, calm, alarming):
    assert not alarms([{f"hsd/{name}": calm}] * 10)
    (found,) = alarms([{f"hsd/{name}": alarming}] * 10)
    assert found in ("empty texts", "leaks")


def test_dapo_draws_with_rounds_alone(tmp_path):
    plain = trainer_of(tmp_path / "a", "dapo", method_args=None, policy_loss="trl")  # TRL's own loss takes no draw
    assert not plain.own_loss and not plain.args.draws
    with pytest.raises(ValueError, match=r"^policy_loss: expected 'fused' with method='dapo', which draws"):
        trainer_of(tmp_path / "b", "dapo", policy_loss="trl")
