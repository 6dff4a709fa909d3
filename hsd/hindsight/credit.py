"""Where the teacher puts its credit, and how many rollouts have a peer (arXiv 2606.15576).

Tensors are ``[B, T]`` over rollouts and their own tokens: prompt excluded, token 0 first, padded on the
right, with a mask that is true on real tokens. What lies at masked positions counts for nothing, NaN
included. Sums are taken in fp32, or in fp64 when that is what came in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def divergence_position(rollout_ids: Sequence[int], peer_ids: Sequence[int]) -> int | None:
    """``tau = min {t : o_t != o+_t}``, the first position where the rollout leaves its peer, counted from 0.

    When the peer is a strict prefix of the rollout, tau is ``len(peer_ids)``: there the rollout goes on and
    the peer stopped. None when the rollout never leaves the peer: it equals the peer or is a prefix of it.
    """
    for t, (token, peer_token) in enumerate(zip(rollout_ids, peer_ids, strict=False)):
        if token != peer_token:
            return t
    return len(peer_ids) if len(rollout_ids) > len(peer_ids) else None


def credit(teacher_logps_BT: Tensor, student_logps_BT: Tensor) -> Tensor:
    """``A_{i,t} = log pi(o_t | q, c_i, o_<t) - log pi(o_t | q, o_<t)`` in nats.

    Equivalent PyTorch: ``teacher_logps_BT.float() - student_logps_BT.float()`` (fp64 stays fp64).
    Positive where the token is likelier with the privileged context than without it.

    Args:
        teacher_logps_BT: ``[B, T]`` log-probabilities of the rollout's tokens with the privileged context.
        student_logps_BT: ``[B, T]`` the same without it.

    Returns:
        ``[B, T]`` in nats, fp32 or fp64.

    Raises:
        ValueError: The shapes differ.
    """
    if teacher_logps_BT.shape != student_logps_BT.shape:
        raise ValueError(
            f"student_logps_BT: expected the teacher's shape {tuple(teacher_logps_BT.shape)}, "
            f"got {tuple(student_logps_BT.shape)}"
        )
    return _at_least_fp32(teacher_logps_BT) - _at_least_fp32(student_logps_BT)


def credit_mass(
    credit_BT: Tensor, mask_BT: Tensor, tau_B: Tensor, windows: Sequence[int] = (2, 4, 8, 16, 32)
) -> Tensor:
    """Share of a rollout's ``|A|`` that lies within ``|t - tau| <= w``, averaged over rollouts.

    Equivalent PyTorch, for one rollout and one window::

        near = (torch.arange(T) - tau).abs() <= w
        share = A[mask & near].abs().sum() / A[mask].abs().sum()

    The share is taken in each rollout first and then averaged, so that a long or loud rollout counts as much
    as any other. Rollouts without a divergence position or with no credit at all are left out.

    Args:
        credit_BT: ``[B, T]`` credit in nats.
        mask_BT: ``[B, T]`` true (or nonzero) on real tokens.
        tau_B: ``[B]`` integer divergence positions, -1 for none.
        windows: Half-widths w in tokens.

    Returns:
        ``[len(windows)]`` shares in [0, 1]; NaN when no rollout qualifies.

    Raises:
        TypeError: ``tau_B`` is not an integer tensor.
        ValueError: Shapes that do not match, or a ``tau_B`` outside ``[-1, T)``.

    Source: arXiv 2606.15576, credit-mass table (HSD at w = 2/4/8/16/32: 23/39/55/76/93 %).
    """
    abs_BT = _masked_abs(credit_BT, mask_BT, tau_B)
    total_B = abs_BT.sum(1)
    kept = (tau_B >= 0) & (total_B != 0)  # a NaN total stays in, and shows
    distance_BT = (torch.arange(abs_BT.shape[1], device=abs_BT.device) - tau_B[:, None]).abs()
    near_BW = torch.stack([abs_BT.where(distance_BT <= w, 0.0).sum(1) for w in windows], dim=1)
    return (near_BW[kept] / total_B[kept, None]).mean(0)


def credit_at_divergence(credit_BT: Tensor, mask_BT: Tensor, tau_B: Tensor) -> Tensor:
    """Mean ``|A|`` in nats at ``t = tau``, over the rollouts that have a token there.

    Arguments and errors are those of :func:`credit_mass`.

    Returns:
        A scalar tensor; NaN when no rollout diverges.
    """
    _, mean_abs, _ = credit_profile(credit_BT, mask_BT, tau_B, before=0, after=0)
    return mean_abs[0]


def credit_profile(
    credit_BT: Tensor, mask_BT: Tensor, tau_B: Tensor, before: int = 16, after: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``|A|`` in nats at each offset ``t - tau``, over the rollouts that have a token there.

    Arguments and errors are those of :func:`credit_mass`, and:

    Args:
        before: Offsets before tau, at least 0.
        after: Offsets after tau, at least 0.

    Returns:
        ``(offsets, mean_abs, count)``, each ``[before + 1 + after]``: the offsets ``-before .. after``, the
        mean (NaN where no rollout has a token), and the number of rollouts in that mean.
    """
    offsets, abs_BO, has_token_BO = around_tau(credit_BT, mask_BT, tau_B, before, after)
    count = has_token_BO.sum(0)
    return offsets, abs_BO.sum(0) / count, count


def around_tau(
    credit_BT: Tensor, mask_BT: Tensor, tau_B: Tensor, before: int, after: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``|A|`` of each rollout by its offset ``t - tau``. Arguments and errors are those of :func:`credit_profile`.

    Returns:
        ``(offsets, abs_BO, has_token_BO)``: ``[O]``, and two ``[B, O]``: nats, 0 without a token, and whether there
        is one.
    """
    for name, value in (("before", before), ("after", after)):
        if value < 0:
            raise ValueError(f"{name}: expected a number of tokens >= 0, got {value}")
    abs_BT = _masked_abs(credit_BT, mask_BT, tau_B)
    offsets = torch.arange(-before, after + 1, device=abs_BT.device)
    position_BO = tau_B[:, None] + offsets
    inside_BO = (tau_B[:, None] >= 0) & (position_BO >= 0) & (position_BO < abs_BT.shape[1])
    position_BO = position_BO.where(inside_BO, 0)
    has_token_BO = inside_BO & mask_BT.bool().gather(1, position_BO)
    return offsets, abs_BT.gather(1, position_BO).where(has_token_BO, 0.0), has_token_BO


def coverage(p: float, group_size: int) -> float:
    """Fraction of rollouts that fail and have a successful peer: ``(1 - p) (1 - (1 - p)^(G - 1))``.

    The formula is the paper's, but its Table 2 prints other values than the formula gives: for G = 8,
    p* = .250 and f* = .344 in the table, .257 and .650 from the formula. This function implements the
    formula, which enumerating all outcomes of a group confirms.

    Args:
        p: Success probability of one rollout.
        group_size: G.

    Raises:
        ValueError: ``p`` outside [0, 1] or ``group_size`` below 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability in [0, 1], got {p}")
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1, got {group_size}")
    return (1 - p) * (1 - (1 - p) ** (group_size - 1))


def coverage_peak(group_size: int) -> tuple[float, float]:
    """``(p*, f*)``: the success probability with the largest :func:`coverage`, and that coverage.

    ``p* = 1 - G^(-1/(G-1))`` and ``f* = (G - 1) G^(-G/(G-1))``; the paper's Table 2 prints other values.

    Raises:
        ValueError: ``group_size`` below 2: a lone rollout has no peer.
    """
    if group_size < 2:
        raise ValueError(f"group_size: expected at least 2, got {group_size}")
    g = group_size
    return 1 - g ** (-1 / (g - 1)), (g - 1) * g ** (-g / (g - 1))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _masked_abs(credit_BT: Tensor, mask_BT: Tensor, tau_B: Tensor) -> Tensor:
    """``|A|`` with zeros where masked, after checking the three arguments every statistic here takes."""
    if credit_BT.dim() != 2:
        raise ValueError(f"credit_BT: expected 2 dimensions [B, T], got shape {tuple(credit_BT.shape)}")
    if mask_BT.shape != credit_BT.shape:
        raise ValueError(f"mask_BT: expected shape {tuple(credit_BT.shape)}, got {tuple(mask_BT.shape)}")
    if tau_B.shape != credit_BT.shape[:1]:
        raise ValueError(f"tau_B: expected shape {tuple(credit_BT.shape[:1])}, got {tuple(tau_B.shape)}")
    if tau_B.dtype == torch.bool or tau_B.is_floating_point() or tau_B.is_complex():
        raise TypeError(f"tau_B: expected an integer tensor, got {tau_B.dtype}")
    outside = tau_B[(tau_B < -1) | (tau_B >= credit_BT.shape[1])]
    if outside.numel():
        raise ValueError(f"tau_B: expected positions in [-1, {credit_BT.shape[1]}), got {outside[0].item()}")
    return _at_least_fp32(credit_BT).abs().where(mask_BT.bool(), 0.0)
