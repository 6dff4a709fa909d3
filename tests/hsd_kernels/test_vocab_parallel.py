"""Vocabulary-parallel: real gloo ranks against one process, uneven and empty shards, and the merge by itself."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from hsd_kernels import Head, fused_hsd_kl
from hsd_kernels.row_stats import COLUMNS, RowStats
from hsd_kernels.rows import eager as torch_rows
from hsd_kernels.testing import flat, row_spec
from hsd_kernels.vocab_parallel import merge_parts

T, D, V = 14, 12, 71
SIZES = {2: (50, 21), 3: (30, 1, 40)}
CASES = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 0.5},
    "jsd": {"divergence": "jsd", "beta": 0.3, "softcap": 5.0},
    "clip": {"clip": 0.02},
    "non-negative clip": {"clip": 0.02, "clip_form": "nonnegative", "divergence": "reverse_kl"},
    "floor": {"floor": 0.6, "divergence": "reverse_kl"},
    "reference": {"reference": True, "token_weight_fn": lambda s: s.teacher_entropy},
    "per token": {"reduction": "none"},
    "own head": {"own_head": True, "logit_scale": -0.5},
    "part without mass": {"silent_part": True},
    "part without mass, reverse": {"silent_part": True, "divergence": "reverse_kl"},
}


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "student_hidden": draw(T, D),
        "teacher_hidden": draw(T, D),
        "reference_hidden": draw(T, D),
        "weight": draw(V, D),
        "bias": draw(V),
        "teacher_head": draw(V, D),
    }


def call(tensors, reference=False, own_head=False, group=None, **options):
    given = {k: v.clone() for k, v in tensors.items()}
    trained = [given[name].requires_grad_() for name in ("student_hidden", "weight", "bias")]
    form = {name: options.pop(name) for name in ("logit_scale", "softcap") if name in options}
    head = Head(given.pop("weight"), given.pop("bias"), **form)
    if not own_head:
        del given["teacher_head"]
    if not reference:
        del given["reference_hidden"]
    weights = torch.linspace(0.0, 2.0, T)
    out = fused_hsd_kl(
        **given,
        head=head,
        **flat(**options),
        reference_coef=0.4 if reference else 0.0,
        target_ids=torch.arange(T) * 5 % V,
        token_weights=weights,
        memory_bytes=4 * 2 * V * 8,
        process_group=group,
        return_stats=True,
    )
    out.loss.backward(torch.linspace(-1.0, 1.0, T).to(out.loss.dtype) if out.loss.dim() else None)
    return out, [t.grad for t in trained]


def shard(tensors, rank, world):
    start = sum(SIZES[world][:rank])
    rows = slice(start, start + SIZES[world][rank])
    return {k: v[rows] if k in ("weight", "bias", "teacher_head") else v for k, v in tensors.items()}, rows


def same(got, want, close, label):
    torch.testing.assert_close(got, want, rtol=close, atol=close, msg=lambda m: f"{label}: {m}")


def worker(rank, world):
    for dtype, close in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        for name, case in CASES.items():
            whole, case = inputs(dtype), dict(case)
            if case.pop("silent_part", False):  # holds some of the targets: their log-probs are -inf, not NaN
                whole["bias"][: SIZES[world][0]] = -torch.inf
            want, want_grads = call(whole, **case)
            assert name.startswith("part") == (want.stats.student_logps == -torch.inf).any()
            part, rows = shard(whole, rank, world)
            got, got_grads = call(part, **case, group=dist.group.WORLD)
            label = f"{name} {dtype} rank {rank}"
            same(got.loss, want.loss, close, f"{label} loss")
            tables = [(got.stats, want.stats), *([(got.reference, want.reference)] if want.reference else [])]
            for ours, theirs in tables:
                for name in COLUMNS:
                    same(getattr(ours, name), getattr(theirs, name), close, f"{label} {name}")
            want_grads = [want_grads[0], want_grads[1][rows], want_grads[2][rows]]
            for a, b in zip(got_grads, want_grads, strict=True):
                same(a, b, close, f"{label} gradient")
            everywhere = [torch.empty_like(got_grads[0]) for _ in range(world)]
            dist.all_gather(everywhere, got_grads[0])
            assert all(torch.equal(e, got_grads[0]) for e in everywhere), label
    mistakes = {
        "^token_weights: expected equal": (T - rank, D, V),
        "^head.weight: expected equal": (T, D - rank, V),
        "^head.weight: expected rows on every rank": (T, D, rank),
    }
    with pytest.raises(ValueError, match=r"^divergence: expected no top_k with a sharded vocabulary, got "):
        call(shard(inputs(), rank, world)[0], top_k=3, group=dist.group.WORLD)
    for message, (tokens, dim, vocab) in mistakes.items():
        h, weight = torch.ones(tokens, dim), torch.ones(vocab, dim)
        with pytest.raises(ValueError, match=message):
            fused_hsd_kl(h, h, weight, process_group=dist.group.WORLD)


@pytest.mark.parametrize("world", SIZES)
def test_ranks_agree_with_one_process(world):
    run_ranks(worker, world)


def parts_of(x_s, x_t, spec, sizes):
    found = []
    for a, b in zip(x_s.split(sizes, 1), x_t.split(sizes, 1), strict=True):
        ids = torch.zeros(len(a), dtype=torch.long)
        stats = torch_rows.statistics(a, b, spec, None, None, ids, ids)
        found.append(stats)
    return RowStats(*(torch.stack(column) for column in zip(*found, strict=True)))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_merge_with_infinite_logits(divergence):
    """A part without mass on one side or both; infinite KL exactly where one process says so."""
    g = torch.Generator().manual_seed(1)
    x_s, x_t = (3.0 * torch.randn(6, 20, generator=g, dtype=torch.float64) for _ in range(2))
    x_s[1, :8] = x_t[1, :8] = -torch.inf  # no mass in the first part, either side
    x_t[2, :8] = -torch.inf  # the teacher alone
    x_s[3, :8] = -torch.inf  # the student alone
    x_s[4, 9] = x_t[4, 9] = -torch.inf
    spec = row_spec(divergence)
    ids = torch.zeros(6, dtype=torch.long)
    whole = torch_rows.statistics(x_s, x_t, spec, None, None, ids, ids)
    merged = merge_parts(parts_of(x_s, x_t, spec, [8, 12]), spec)
    for name in COLUMNS:
        if "logps" not in name:
            ours, theirs = getattr(merged, name), getattr(whole, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


def test_merge_keeps_a_tiny_kl():
    """KL of 1e-9 out of parts whose normalisers differ by nothing: no cancellation of large numbers."""
    g = torch.Generator().manual_seed(2)
    x_t = 5.0 * torch.randn(4, 40, generator=g, dtype=torch.float64)
    x_s = x_t + 3e-4 * torch.randn(4, 40, generator=g, dtype=torch.float64)
    spec = row_spec()
    ids = torch.zeros(4, dtype=torch.long)
    exact = torch_rows.statistics(x_s, x_t, spec, None, None, ids, ids).kl
    assert 1e-11 < exact.min() and exact.max() < 1e-6
    merged = merge_parts(parts_of(x_s, x_t, spec, [10, 30]), spec).kl
    torch.testing.assert_close(merged, exact, rtol=1e-5, atol=1e-13)
