"""The losses over extra rows and over marks against their equations over full logits in fp64, and their identities."""

import math

import pytest
import torch
from recipe_cases import (
    ADVANTAGES,
    LENGTH,
    MASK,
    SHOWN,
    SUCCESS,
    B,
    Case,
    D,
    G,
    T,
    draw,
    kl,
    over_rollouts,
    over_tokens,
    surrogate,
)
from torch.nn.functional import logsigmoid

from hsd.methods import METHODS
from hsd.methods.method import Generation
from hsd.methods.state import Playbook
from hsd.methods.term import Stats
from hsd.policy.forward import FrozenStates, Prompts, RolloutInputs
from hsd.train.batch import PackedRows, RolloutBatch, unpack
from hsd.train.micro_batch import MicroBatchLoss, States
from hsd_kernels import Head

S = 7  # tokens of the longest row, more than a rollout's
# Rollouts 0 and 3 have rows, two each; the lengths differ.
ROW_LENGTH = {(0, 0): 7, (0, 1): 3, (3, 0): 2, (3, 1): 5}


class Rows(Case):
    """A `Case` with M extra rows behind its rollouts."""

    def __init__(self, method, *, marks=None, weight=1.0, same=False, **options):
        super().__init__(method, **options)
        most = self.method.max_rows
        mask, ids = torch.zeros(B, most, S, dtype=torch.long), torch.zeros(B, most, S, dtype=torch.long)
        for (i, slot), n in ROW_LENGTH.items():
            if slot < most:
                mask[i, slot, :n] = 1
                ids[i, slot, :n] = torch.randint(11, (n,), generator=torch.Generator().manual_seed(50 + 10 * i + slot))
        count = mask.any(-1).sum().float()
        packed = PackedRows(
            ids, mask, torch.full((B, most), weight), count, mask.unsqueeze(2), mask.unsqueeze(2)
        ).pack()
        prompts = torch.ones(B, 2, dtype=torch.long)
        facts = self.batch.teacher.pack() | {"teacher_prompt_ids": prompts, "teacher_prompt_mask": prompts}
        trl = {"prompt_ids": prompts, "prompt_mask": prompts, "completion_ids": self.ids, "completion_mask": MASK}
        own = {f"column/{k}": v for k, v in (marks or {}).items()}
        self.batch = unpack({**trl, **facts, **packed, **own, "advantages": ADVANTAGES})
        self.extra = self.batch.extra
        if self.extra is None:
            return
        m = len(self.extra.owner)
        self.states = draw(60, B + m, S, D).requires_grad_()
        self.seen = draw(61, B + m, S, D) if not same else self.states.detach()
        log = lambda h: torch.einsum("btd,vd->btv", h, self.weight).log_softmax(-1)  # noqa: E731
        self.p, self.q = log(self.states[:B, :T]), [log(self.seen[:B, :T]).detach()]
        self.rp, self.rq = log(self.states[B:]), log(self.seen[B:]).detach()
        at = lambda x, i: x.gather(-1, i[..., None])[..., 0]  # noqa: E731
        self.lp, self.lq = at(self.p, self.ids), [at(self.q[0], self.ids)]
        self.rlp, self.rlq = at(self.rp, self.extra.ids), at(self.rq, self.extra.ids)
        self.r = log(draw(62, B, T, D)).detach()
        self.reference_states = FrozenStates(draw(62, B + m, S, D))
        self.r = log(self.reference_states.hidden[:B, :T]).detach()

    def result(self):
        made = MicroBatchLoss(None, "none", self.config.loss_mean, self.config.mean_of_policy)
        teachers = (FrozenStates(self.seen),) if self.config.has_teacher else ()
        states = States(self.states, teachers, self.reference_states)
        return made._of(states, Head(self.weight), self.batch, self.objective, range(len(self.states))).loss

    def check(self, expected):
        loss = self.result()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-9)
        inputs = (self.states, self.weight)
        for got, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
            assert wanted.abs().max() > 1e-4
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)

    def over_rows(self, x):
        """The mean over a row's tokens, then over rows."""
        return ((x * self.extra.mask).sum(-1) / self.extra.mask.sum(-1)).mean()


def test_stable_opd():
    c = Rows("stable_opd", method_args={"gold": 0.7}, reference_coef=0.3)
    anchor = over_rollouts(kl(c.p, c.r), c.shown)  # under loss_mean "rollout"
    c.check(surrogate(c, c.d, over_tokens) - 0.7 * c.over_rows(c.rlp) + 0.3 * anchor)


def test_brts():
    c = Rows("brts")
    c.check(over_rollouts(kl(c.p, c.q[0]), c.shown) + 10.0 * c.over_rows(kl(c.rq, c.rp)))


def test_brts_follows_a_trajectory_that_is_infinitely_far_from_the_student():
    def of_logits_up_to(size):
        """The largest KL(q || p) of a token, and the gradient."""
        c = Rows("brts")
        with torch.no_grad():
            logits = c.states[B, 0] @ c.weight.T
            c.states[B, 0] *= size / logits.abs().max()
            student, teacher = ((x[B, 0] @ c.weight.T).log_softmax(-1) for x in (c.states, c.seen))
        return kl(teacher, student).item(), torch.autograd.grad(c.result(), (c.states, c.weight))

    (far, expected), (infinite, found) = of_logits_up_to(1e10), of_logits_up_to(1.2e308)
    assert math.isfinite(far) and infinite == math.inf
    torch.testing.assert_close(found[0][B:], expected[0][B:])
    assert expected[0][B, 0].abs().max() > 0.1 and found[1].isfinite().all()


def test_mixed_policy():
    c = Rows("mixed_policy")
    c.check(c.over_rows(kl(c.rp, c.rq)))


def test_plan_reference():
    c = Rows("plan_reference")
    w = (c.rlp.detach().exp() * c.rlq.exp()).sqrt() * c.extra.mask
    w = w / (w.sum(-1, keepdim=True) / c.extra.mask.sum(-1, keepdim=True))
    c.check(surrogate(c, c.a) - c.over_rows(w * c.rlp))


def pbsd_margin(c):
    gap = ((c.rlp - c.rlq) * c.extra.mask).sum(-1)
    return gap[0::2] - gap[1::2]  # y+ and y- of rollout 0, then of rollout 3


def test_pbsd():
    c = Rows("pbsd", method_args={"beta": 0.4})
    c.check(-logsigmoid(0.4 * pbsd_margin(c)).mean())


def test_pbsd_of_equal_policies_is_log_2():
    c = Rows("pbsd", method_args={"beta": 0.4}, same=True)
    assert c.result().item() == pytest.approx(math.log(2.0))


def test_a_rows_weight_scales_it():
    plain, half = (Rows("mixed_policy", weight=w).result().item() for w in (1.0, 0.5))
    assert half == pytest.approx(0.5 * plain)


def test_rows_change_no_mean_of_the_rollouts():
    c = Rows("stable_opd", method_args={"gold": 0.0}, reference_coef=0.0)
    alone = Rows("stable_opd", method_args={"gold": 0.0}, reference_coef=0.0)
    alone.batch = RolloutBatch(**{**vars(alone.batch), "extra": None})
    made = MicroBatchLoss(None, "none", c.config.loss_mean, c.config.mean_of_policy)
    states = States(c.states[:B, :T], (FrozenStates(c.seen[:B, :T]),), None)
    assert made._of(states, Head(c.weight), alone.batch, c.objective, range(B)).loss == c.result()


def trace(step, **args):
    key, error = torch.zeros(B, T), torch.zeros(B, T)
    key[0, 1:3], key[3, 0], error[1, 1], error[2, :2], error[5, 0] = 1.0, 1.0, 1.0, 1.0, 1.0
    c = Case("trace", step=step, method_args=args)
    own = {"key": key, "error": error}
    c.batch = RolloutBatch(**{**vars(c.batch), "own": own})
    return c, key * c.shown, error * c.shown


def test_trace():
    c, key, error = trace(20, mu_key=0.7, mu_error=0.4)
    fade = 0.5 * 20 / 30
    forward = (c.q[0].exp() * (c.q[0] - c.p)).clamp(max=0.05).sum(-1)
    reverse = (c.p.exp() * (c.p - c.q[0])).clamp(max=0.05).sum(-1)
    marks = c.batch.own["key"] + c.batch.own["error"]
    a = c.a * (1.0 - marks * fade / 0.5)
    spans = ((0.7 * key * forward + 0.4 * error * reverse).sum(-1) / LENGTH[:, 0]).mean()
    c.check(surrogate(c, a, over_tokens) + fade * spans)


def test_trace_is_dapo_from_step_40_on():
    c, _, _ = trace(40)
    b = Case("dapo")
    first, second = c.loss(c.batch, c.objective).loss, b.loss(b.batch, b.objective).loss
    assert first == second
    assert torch.equal(*(torch.autograd.grad(x, y.hidden)[0] for x, y in ((first, c), (second, b))))
    assert c.objective.epsilon_high == b.objective.epsilon_high


def test_the_facts_of_these_cases():
    assert SUCCESS.tolist() == [True, False, False, True, True, False] and G == 3 and not SHOWN[5]


def test_what_goes_through_the_models_is_rollouts_and_then_rows():
    c = Rows("pbsd", method_args={"beta": 1.0})
    whole = c.batch.whole
    assert isinstance(whole, RolloutInputs) and whole.completion_ids.shape == (B + 4, S)
    assert c.extra.owner.tolist() == [0, 0, 3, 3] and c.extra.slot.tolist() == [0, 1, 0, 1]
    assert torch.equal(whole.completion_ids[:B, :T], c.ids) and torch.equal(whole.completion_ids[B:], c.extra.ids)
    teacher = whole.prompts["teacher"]
    assert isinstance(teacher, Prompts) and teacher.ids.shape == (B + 4, S)
    assert teacher.mask[:B].sum(-1).tolist() == [2] * B and teacher.mask[:B, :-2].sum() == 0


def test_rcsd():
    c = Case("rcsd", kl_top_k=4, kl_temperature=1.0)
    at = c.q[0].topk(4, -1).indices
    p, q = (x.gather(-1, at).log_softmax(-1) for x in (c.p, c.q[0]))
    c.check(over_tokens((q.exp() * (q - p)).clamp(max=0.05).sum(-1), c.shown))


def test_sdpo_as_published():
    c = Case("sdpo", kl_top_k=4)
    at = c.p.detach().topk(4, -1).indices
    tail = lambda x: x.scatter(-1, at, -torch.inf).logsumexp(-1, keepdim=True)  # noqa: E731
    p, q = (torch.cat([x.gather(-1, at), tail(x)], -1) for x in (c.p, c.q[0]))
    m = (0.5 * p.exp() + 0.5 * q.exp()).log()
    c.check(over_tokens(0.5 * (kl(p, m) + kl(q, m)), c.shown))


def test_resd():
    c = Case("resd", kl_top_k=0, divergence="reverse_kl")
    floored = torch.maximum(c.q[0], c.p.detach() + math.log(0.2))
    s = SUCCESS.double().mean()
    w = torch.where(SUCCESS, 1 - s, s)
    assert (floored > c.q[0]).any()
    c.check(over_tokens((w / w.mean())[:, None] * (c.p.exp() * (c.p - floored)).sum(-1), c.shown))


@pytest.mark.parametrize("success", [0.0, 1.0])
def test_resds_weights_are_1_on_average_and_in_unmixed_batches(success):
    for flags, mixed in ((torch.full((4, 1), success), False), (torch.tensor([[1.0], [1.0], [1.0], [0.0]]), True)):
        stats = Stats(None, {"success": flags, "scored": torch.ones(4, 1)}, {"weighted": True})
        weight = METHODS["resd"].on_batch(Generation(stats, lambda x: x), None)["weight"]
        assert weight.mean().item() == pytest.approx(1.0)
        assert mixed or weight.tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("success", "scored", "expected"),
    [
        ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]),  # s = 1/2 of the two that have a verdict
        ([1, 0, 0, 0], [1, 1, 1, 0], [1.5, 0.75, 0.75, 0]),
        ([0, 0], [1, 0], [1, 0]),  # one alone
        ([0, 0], [0, 0], [0, 0]),
    ],
)
def test_resd_leaves_rollouts_without_a_verdict_out(success, scored, expected):
    columns = {"success": torch.tensor(success)[:, None] > 0, "scored": torch.tensor(scored)[:, None] > 0}
    generation = Generation(Stats(None, columns, {"weighted": True}), lambda x: x)
    assert METHODS["resd"].on_batch(generation, None)["weight"].tolist() == pytest.approx(expected)


def test_a_lesson_is_proven_once_and_the_book_is_short():
    book, none = Playbook(), Playbook()
    for n in range(4):
        for a, most in ((book, 3), (none, 0)):
            a.lessons["q"] = f"lesson {n}"
            a.prove("q", most), a.prove("q", most)
    assert book.lines == ["lesson 1", "lesson 2", "lesson 3"] and not book.lessons and not none.lines
