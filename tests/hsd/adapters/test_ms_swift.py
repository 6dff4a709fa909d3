"""ms-swift's GKD loss, from its own file, is `fused_hsd_kl` with the page's arguments."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from hsd_kernels import Divergence, fused_hsd_kl


@pytest.fixture(scope="module")
def gkd():
    """The file alone: the package imports another TRL and another transformers than ours."""
    found = importlib.util.find_spec("swift")
    if found is None or not found.submodule_search_locations:
        pytest.skip("ms-swift is not installed: make test-engines has it")
    path = Path(next(iter(found.submodule_search_locations))) / "rlhf_trainers" / "gkd_loss.py"
    spec = importlib.util.spec_from_file_location("ms_swift_gkd_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 0.7), (1.0, 2.0)])
def test_gkd_loss_with_a_teacher_prompt_of_its_own(beta, temperature, gkd):
    g = torch.Generator().manual_seed(0)
    student, weight = (torch.randn(s, generator=g).requires_grad_() for s in ((2, 7, 8), (23, 8)))
    teacher = torch.randn(2, 9, 8, generator=g)  # two tokens longer prompts
    labels, teacher_labels = torch.full((2, 7), -100), torch.full((2, 9), -100)
    labels[0, 2:6] = labels[1, 4:6] = teacher_labels[0, 4:8] = teacher_labels[1, 6:8] = 1
    output = gkd.TeacherOutput(full_logits=(teacher @ weight.T).detach(), labels=teacher_labels)
    total, count = gkd.gkd_loss(student @ weight.T, output, labels, beta, temperature)
    divergence = Divergence("jsd", beta, temperature)
    loss = fused_hsd_kl(student[labels != -100], teacher[teacher_labels != -100], weight, divergence=divergence)
    torch.testing.assert_close(loss, total / count)
    expected = torch.autograd.grad(total / count, (student, weight))
    for got, want in zip(torch.autograd.grad(loss, (student, weight)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
