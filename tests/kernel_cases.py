"""Small problems in any dtype and with any option, and the judgement of `fused_hsd_kl` on one of them.

The error against fp64 is at most twice that of the eager reference in fp32, plus the roundings that both make
(`assert_within_budget`)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hsd_kernels import Divergence, Head, fused_hsd_kl, reference
from hsd_kernels.testing import assert_within_budget

T, D, V = 12, 16, 61
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RELATIVE_L1 = {torch.float64: 1e-13, torch.float32: 3e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
TRAINED = ("student_hidden", "weight", "bias")


@dataclass
class Case:
    """Inputs in ``dtype`` and everything else of one call."""

    tensors: dict[str, Tensor]
    divergence: Divergence = field(default_factory=Divergence)
    form: dict = field(default_factory=dict)  # logit_scale, softcap
    options: dict = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        dtype,
        kind="forward_kl",
        seed=0,
        *,
        bias=False,
        teacher_dim=None,
        teacher_bias=False,
        reference_dim=None,
        token_weights=False,
        form=None,
        divergence=None,
        **options,
    ):
        """``form``: fields of the head, ``divergence``: fields beside the kind."""
        g = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        tensors = {"student_hidden": draw(T, D), "teacher_hidden": draw(T, teacher_dim or D)}
        tensors["weight"] = draw(V, D, scale=0.5)
        if teacher_dim is not None:
            tensors["teacher_weight"] = draw(V, teacher_dim, scale=0.5)
        if reference_dim is not None:
            tensors["reference_hidden"] = draw(T, reference_dim)
            if reference_dim != D:
                tensors["reference_weight"] = draw(V, reference_dim, scale=0.5)
        if bias:
            tensors["bias"] = draw(V)
        if teacher_bias:
            tensors["teacher_bias"] = draw(V)
        if token_weights:
            w = draw(T)
            w[::3] = 0.0
            options["token_weights"] = w
        return cls(tensors, Divergence(kind, **divergence or {}), form or {}, options)

    def heads(self, given):
        """{"student": Head, ...} of the tensors ``given``, under the names of ``self.tensors``."""
        own = Head(given["weight"], given.get("bias"), **self.form)
        found = {"student": own, "teacher": own, "reference": own}
        for side in ("teacher", "reference"):
            if f"{side}_weight" in given:
                found[side] = own.with_tensors(given[f"{side}_weight"], given.get(f"{side}_bias"))
        return found

    def call(self, loss_fn, given=None, **options):
        given = self.tensors if given is None else given
        heads = self.heads(given)
        others = {f"{side}_head": heads[side] for side in ("teacher", "reference") if f"{side}_weight" in given}
        if "reference_hidden" in given:
            others["reference_hidden"] = given["reference_hidden"]
        options = self.options | options | {"divergence": self.divergence}
        return loss_fn(given["student_hidden"], given["teacher_hidden"], heads["student"], **others, **options)

    def run(self, loss_fn, dtype=None, upstream=None, **options):
        """(loss, gradients by name); ``upstream`` is the gradient for a per-token loss."""
        given = {k: v.detach().to(dtype or v.dtype, copy=True) for k, v in self.tensors.items()}
        trained = {k: t.requires_grad_() for k, t in given.items() if k in TRAINED}
        if dtype is not None and "token_weights" in self.options:
            options["token_weights"] = self.options["token_weights"].to(dtype)
        loss = self.call(loss_fn, given, **options)
        loss.backward(None if upstream is None else upstream.to(loss.dtype))
        return loss.detach(), {k: t.grad for k, t in trained.items()}

    def logits(self, dtype, side):
        given = {k: v.to(dtype) for k, v in self.tensors.items()}
        return reference.logits(given[f"{side}_hidden"], self.heads(given)[side], self.divergence.temperature)

    @property
    def noise(self):
        """How many roundings at size 1 a log-prob may carry: one of each side's logit, and one of its log-sum-exp,
        which shifts a whole row and so does not average out as the errors of single logits do."""
        return 2.0 * (1.0 + max(self.logits(torch.float64, s).abs().max().item() for s in ("student", "teacher")))

    @property
    def sharpness(self):
        """Logits compared per raw head output."""
        return abs(self.form.get("logit_scale", 1.0)) / self.divergence.temperature


def check(case, dtype, reduction="mean", upstream=None):
    given = {"reduction": reduction, "upstream": upstream}
    exact, exact_grads = case.run(reference.hsd_kl, torch.float64, **given)
    eager, eager_grads = _eager(case, dtype, exact, exact_grads, given)
    loss, grads = case.run(fused_hsd_kl, impl="torch", **given)
    assert loss.dtype == wide(dtype) and grads.keys() == exact_grads.keys()
    per_token = case.run(reference.hsd_kl, torch.float64, reduction="none", upstream=torch.ones(T))[0]
    noise = case.noise * (1.0 + _largest(per_token))  # of a probability, times the log-ratio it weights
    assert_within_budget("loss", loss, eager, exact, scale=noise * (T if reduction == "sum" else 1))
    token_weight = _largest(case.options.get("token_weights")) * _largest(upstream)
    if reduction == "mean":
        token_weight /= case.options.get("num_items", T)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        # Logit noise reaches dz as it reaches the loss, and then a GEMM with the other factor of the logits.
        other = {"student_hidden": case.tensors["weight"], "weight": case.tensors["student_hidden"]}.get(name)
        eps = torch.finfo(wide(dtype)).eps / torch.finfo(dtype).eps
        magnitude = noise * case.sharpness * _largest(other) * eps * token_weight + _largest(exact_grads[name])
        assert_within_budget(name, grad, eager_grads[name], exact_grads[name], scale=magnitude)
        # Where the rows are saturated the whole gradient is rounding, eager or not.
        ours, theirs = (relative_l1(g, exact_grads[name]) for g in (grad, eager_grads[name].to(dtype)))
        assert ours <= max(RELATIVE_L1[dtype], 2.0 * theirs), f"{name}: relative L1 {ours:.1e}, eager {theirs:.1e}"


def _eager(case, dtype, exact, exact_grads, given):
    """The eager computation at the precision promised: fp32 arithmetic on the rounded inputs. For fp64 the same error
    scaled down by the ratio of the precisions, because no better truth is at hand."""
    loss, grads = case.run(reference.hsd_kl, torch.float32, **given)
    if dtype == torch.float64:
        shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        loss = exact + (loss.double() - exact) * shrink
        grads = {k: exact_grads[k] + (g.double() - exact_grads[k]) * shrink for k, g in grads.items()}
    return loss, grads


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _largest(t):
    return 1.0 if t is None else t.abs().max().item()


def relative_l1(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().sum() / want.double().abs().sum()).item()
