"""packed_loss against an eager computation of verl's semantics on padded (B, T, V) logits."""

import pytest
import torch

from hsd.adapters.packed import packed_loss, response_rows

B, T, D, V = 3, 6, 8, 23
LENGTHS = (6, 3, 5)  # a prompt of two tokens and a response each; the second rollout has no context


@pytest.fixture
def states():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]
    counted = mask.float()
    counted[:, :2] = 0
    counted[1] = 0
    found = {
        "student": torch.randn(B, T, D, generator=g),
        "teacher": torch.randn(B, T, D, generator=g),
        "weight": torch.randn(V, D, generator=g),
        "targets": torch.randint(V, (B, T), generator=g),
        "old": -3.0 + torch.rand(B, T, generator=g),
        "rollout": 0.5 + torch.rand(B, T, generator=g),
    }
    return found | {"mask": mask, "counted": counted}


def eager(s, student, weight, *, alpha, temperature, is_clip, corrected, aggregation):
    """Dense logits, each quantity from its definition."""
    ls = (student @ weight.T / temperature).log_softmax(-1)
    lt = (s["teacher"] @ weight.detach().T / temperature).log_softmax(-1)
    ps, pt = ls.exp(), lt.exp()
    if alpha == 0:
        kl = (pt * (lt - ls)).sum(-1)
    elif alpha == 1:
        kl = (ps * (ls - lt)).sum(-1)
    else:
        lm = (alpha * pt + (1 - alpha) * ps).log()
        kl = (alpha * pt * (lt - lm) + (1 - alpha) * ps * (ls - lm)).sum(-1)
    logp, teacher_logp = (x.gather(-1, s["targets"][..., None])[..., 0] for x in (ls, lt))
    ratio = (logp - s["old"]).detach().exp().clamp(max=is_clip) if is_clip is not None else torch.ones_like(logp)
    per_token = kl * ratio * (s["rollout"] if corrected else 1.0)
    m = s["counted"]
    if aggregation == "token-mean":
        loss = (per_token * m).sum() / m.sum()
    else:
        rows = (per_token * m).sum(-1)
        if aggregation == "seq-mean-token-mean":
            rows = rows / m.sum(-1).clamp_min(1)
        loss = rows.sum() / (m.sum(-1) > 0).sum()
    return loss, per_token, logp, teacher_logp, -(ps * ls).sum(-1), ratio


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("is_clip", [None, 1.2])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_loss_gradient_and_everything_per_token(alpha, is_clip, corrected, aggregation, states):
    s = states
    options = {"alpha": alpha, "temperature": 0.7, "is_clip": is_clip, "aggregation": aggregation}
    leaves = [(s["student"].clone().requires_grad_(), s["weight"].clone().requires_grad_()) for _ in range(2)]
    loss, *expected = eager(s, *leaves[0], corrected=corrected, **options)
    loss.backward()

    pick = s["mask"]
    out = packed_loss(
        leaves[1][0][pick],
        s["teacher"][pick],
        leaves[1][1],
        target_ids=s["targets"][pick],
        loss_mask=s["counted"][pick],
        old_logps=None if is_clip is None else s["old"][pick],
        rollout_is_weights=s["rollout"][pick] if corrected else None,
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0),
        **options,
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(leaves[1], leaves[0], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    found = (out.per_token_loss, out.student_logps, out.teacher_logps, out.student_entropy, out.is_ratio)
    live = s["counted"][pick] != 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[live], theirs[pick][live].detach(), rtol=1e-5, atol=1e-5)
        assert not ours[~live].any() and not ours.requires_grad


def test_a_global_batch_has_its_own_normalizer(states):
    s, pick = states, states["mask"]
    args = (s["student"][pick], s["teacher"][pick], s["weight"])
    given = {"target_ids": s["targets"][pick], "loss_mask": s["counted"][pick]}
    one, ten = (packed_loss(*args, **given, normalizer=n).loss for n in (1.0, 10.0))
    torch.testing.assert_close(one, 10 * ten)


def test_response_rows_of_both_sides_are_the_same_tokens():
    """States numbered by (side, row, position): the picked ones stand right before the response's tokens."""
    length, widths = 4, {"student": 3, "teacher": 6}
    responses = torch.tensor([4, 1, 2])
    live = torch.arange(length)[None] < responses[:, None]
    for prompts, width in (([3, 1, 2], widths["student"]), ([4, 6, 1], widths["teacher"])):
        left = torch.arange(width)[None] >= width - torch.tensor(prompts)[:, None]
        mask = torch.cat([left, live], 1).long()
        padded = torch.arange(mask.numel()).view_as(mask)
        picked = padded[mask.bool()][response_rows(mask, length)]
        assert torch.equal(picked + 1, padded[:, -length:][live])


def test_what_it_refuses(states):
    s, pick = states, states["mask"]
    args = (s["student"][pick], s["teacher"][pick], s["weight"])
    given = {"target_ids": s["targets"][pick], "loss_mask": s["counted"][pick]}
    with pytest.raises(ValueError, match=r"^loss_mask: expected shape \(14,\), got \(3, 6\)"):
        packed_loss(*args, **given | {"loss_mask": s["counted"]})
    with pytest.raises(ValueError, match=r"^is_clip: expected with old_logps"):
        packed_loss(*args, **given, is_clip=2.0)
    with pytest.raises(ValueError, match=r"^aggregation: expected .* got 'mean'"):
        packed_loss(*args, **given, aggregation="mean")
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected"):
        packed_loss(*args, **given, aggregation="seq-mean-token-sum")
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected bounds that end at 14, got 13"):
        packed_loss(*args, **given, aggregation="seq-mean-token-sum", cu_seqlens=torch.tensor([0, 13]))
