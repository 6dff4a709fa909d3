"""What the tests of recipes share: a batch with all that a method may read, its full logits, and means over it."""

import torch

from hsd.methods import METHODS
from hsd.methods.method import Generation
from hsd.methods.term import Stats
from hsd.policy.forward import FrozenStates, RolloutInputs
from hsd.train.batch import RolloutBatch, TeacherBatch
from hsd.train.config import HSDConfig
from hsd.train.update import Objective, method_loss
from hsd_kernels import Head

B, T, D, V, G = 6, 5, 6, 11, 3
MASK = torch.tensor(
    [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
)
SUCCESS = torch.tensor([True, False, False, True, True, False])
ADVANTAGES = torch.tensor([1.2, -0.7, -0.5, 0.6, 0.4, -1.1], dtype=torch.float64)
SHOWN = torch.tensor([True, True, True, True, True, False])  # the last rollout's teacher has no context
LENGTH = MASK.sum(-1, keepdim=True).double()
NUMBERS = {"max_completion_length": 8, "num_generations": G}


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """A batch with everything that a method may read, and its full logits."""

    def __init__(self, method, *, step=1, contexts=1, advantages=ADVANTAGES, state=None, scored=None, **options):
        self.method = METHODS[method]
        options = {"bf16": False, "use_cpu": True, "per_device_train_batch_size": B, **NUMBERS} | options
        self.config = HSDConfig("unused", method=method, **options)
        self.objective = self.config.objective(step)
        self.hidden = draw(1, B, T, D).requires_grad_()
        self.weight = draw(2, V, D, scale=0.8).requires_grad_()
        self.teachers = [FrozenStates(draw(3 + k, B, T, D)) for k in range(contexts)]
        self.reference = FrozenStates(draw(20, B, T, D))
        self.ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(9))
        several = None
        if contexts > 1:
            several = SHOWN[:, None].float().repeat(1, contexts)
            several[1, 1:] = 0.0  # fewer contexts than the others
        rates = SUCCESS.reshape(-1, G).double().mean(-1).repeat_interleave(G)
        count = torch.tensor(float(MASK.sum()))
        facts = TeacherBatch(
            SUCCESS, SHOWN, torch.full((B,), -1), (MASK * SHOWN[:, None]).sum().float(), None, None, several, count,
            SUCCESS.float(), rates, torch.ones_like(SUCCESS) if scored is None else scored,
            torch.full((B,), G),
        )  # fmt: skip
        inputs = RolloutInputs({}, self.ids, MASK)
        batch = RolloutBatch(inputs, MASK, facts, advantages, None, {}, self.config.skip_tokens)
        self.state = state or (self.method.state() if self.method.state else None)
        own, self.advantages = {}, advantages
        if self.method.on_batch is not None:
            measured = Objective(self.objective.divergence)
            rows = self.loss(batch, measured, terms=()).stats
            stats = Stats(rows, batch.columns, self.config.settings, step, self.objective.advantage_mix)
            own = dict(self.method.on_batch(Generation(stats, lambda x: x), self.state))
            self.advantages = own.pop("advantages", advantages)
        self.batch = RolloutBatch(inputs, MASK, facts, self.advantages, None, own, self.config.skip_tokens)
        logits = lambda h: torch.einsum("btd,vd->btv", h, self.weight)  # noqa: E731
        self.p = logits(self.hidden).log_softmax(-1)
        self.q = [logits(t.hidden).detach().log_softmax(-1) for t in self.teachers]
        self.r = logits(self.reference.hidden).detach().log_softmax(-1)
        self.lp, self.lr = (x.gather(-1, self.ids[..., None])[..., 0] for x in (self.p, self.r))
        self.lq = [x.gather(-1, self.ids[..., None])[..., 0] for x in self.q]
        self.shown = SHOWN[:, None] * MASK

    def loss(self, batch, objective, **changes):
        if changes:
            objective = Objective(objective.divergence, terms=changes["terms"])
        targets = batch.targets(self.config.loss_mean, self.config.mean_of_policy)
        teachers = self.teachers if self.config.has_teacher else ()
        return method_loss(self.hidden, Head(self.weight), teachers, self.reference, targets, objective)

    @property
    def a(self):
        return self.advantages[:, None]

    @property
    def d(self):
        """D, 0 where there is no teacher."""
        return (self.lq[0] - self.lp.detach()) * self.shown

    def check(self, expected):
        out = self.loss(self.batch, self.objective)
        torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-9)
        inputs = (self.hidden, self.weight)
        for got, wanted in zip(
            torch.autograd.grad(out.loss, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            assert wanted.abs().max() > 1e-4
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def over_rollouts(x, mask=MASK):
    return ((x * mask).sum(-1) / mask.sum(-1).clamp_min(1)).mean()


def over_tokens(x, mask=MASK):
    return (x * mask).sum() / mask.sum()


def kl(a, b):
    return (a.exp() * (a - b)).sum(-1)


def entropy(a):
    return -(a.exp() * a).sum(-1)


def surrogate(c, advantages, mean=over_rollouts):
    return mean(-(c.lp - c.lp.detach()).exp() * advantages)
