"""The three matrix products, by our own, by MKL where this torch carries it and upcast, and the memory they run in."""

import threading
import types

import pytest
import torch

from hsd_kernels import fused_hsd_kl, gemm, memory, reference
from hsd_kernels.testing import assert_within_budget

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


class Idle:
    """A routine that leaves its output as it was."""

    def __call__(self, *args):
        pass


ALL = {"vdpbf16ps": True, "tiles": True, "mkl": True}
MACHINES = {
    "vdpbf16ps": gemm.Machine("avx512", **ALL),
    "tiles": gemm.Machine("amx", **ALL),
    "mkl": gemm.Machine("avx512", **ALL | {"vdpbf16ps": False}),
    "upcast": gemm.Machine("none", **ALL),
}


@pytest.fixture(params=MACHINES)
def route(request, monkeypatch):
    """The products as some CPU would have them computed, as far as this one can."""
    machine, here = MACHINES[request.param], gemm.machine()
    if request.param in OWN:
        products(request.param)
    elif request.param == "upcast":
        monkeypatch.setattr(gemm, "UPCAST_ROWS", 50)
    elif not here.mkl:
        pytest.skip("this build of torch does not export MKL's cblas_gemm_bf16bf16f32")
    monkeypatch.setattr(gemm, "machine", lambda: machine)
    return request.param


OWN = ("vdpbf16ps", "tiles")


def products(by):
    """(hidden, weight, out) -> out = hidden @ weight.T, (dz, hidden, out, adds) -> out = or += dz.T @ hidden."""
    if not getattr(gemm.machine(), by):
        pytest.skip(f"the C++ library is not built, or finds no {by} on this CPU")

    def how():
        return {"tiles": by == "tiles", "threads": torch.get_num_threads()}

    def project_out(hidden, weight, out):
        torch.ops.hsd_cpu.project_out(out, hidden, weight, **how())

    def accumulate(dz, hidden, out, adds=False):
        torch.ops.hsd_cpu.accumulate(out, dz, hidden, adds=adds, **how())

    return project_out, accumulate


own_products = pytest.mark.parametrize("by", OWN)


@pytest.mark.parametrize(
    ("machine", "logits", "dh_into_bf16", "dh_into_fp32", "dw"),
    [
        (gemm.Machine("avx512", **ALL), "vdpbf16ps", "torch", "mkl", "vdpbf16ps"),
        (gemm.Machine("avx512", **ALL | {"mkl": False}), "vdpbf16ps", "torch", "torch", "vdpbf16ps"),
        (gemm.Machine("avx512", False, True, True), "mkl", "torch", "mkl", "mkl"),
        (gemm.Machine("avx512", False, False, False), "torch", "torch", "torch", "torch"),
        (gemm.Machine("amx", **ALL), "tiles", "torch", "mkl", "tiles"),
        (gemm.Machine("amx", True, False, True), "mkl", "torch", "mkl", "mkl"),
        (gemm.Machine("amx", True, False, False), "torch", "torch", "torch", "torch"),
        (gemm.Machine("none", **ALL), "torch", "torch", "torch", "torch"),
    ],
)
def test_the_plan(machine, logits, dh_into_bf16, dh_into_fp32, dw):
    hidden, weight, dz = draw(3, 5), draw(7, 5), draw(3, 7)
    assert gemm.plan("logits", hidden, weight, F32, machine) == logits
    assert gemm.plan("dH", dz, weight, BF16, machine) == dh_into_bf16
    assert gemm.plan("dH", dz, weight, F32, machine) == dh_into_fp32
    assert gemm.plan("dW", dz, hidden, F32, machine) == dw
    assert gemm.plan("dW", dz, hidden, BF16, machine) == "torch"  # of one chunk, rounded by torch's product
    overlapping = weight.view(-1).as_strided((7, 5), (3, 1))
    for odd in (weight.T.contiguous().T, overlapping, weight.float(), weight.half(), weight.to("meta")):
        assert gemm.plan("logits", hidden.to(odd), odd, F32, machine) == "torch"


@pytest.mark.parametrize("default", [{"dtype": BF16}, {"dtype": F64}, {"device": "meta"}], ids=str)
def test_torch_defaults_change_nothing(default):
    """Addresses go to MKL and to the C++ rows: a default device's would be read as this one's."""
    torch.manual_seed(0)
    for dtype in (F32, BF16):
        student, teacher, weight = (torch.randn(*shape).to(dtype) for shape in ((4, 16), (4, 16), (61, 16)))
        want, routine = fused_hsd_kl(student, teacher, weight, return_stats=True), gemm._mkl_routine.__wrapped__()
        memory.release_memory()
        before = torch.get_default_dtype(), torch.get_default_device()
        torch.set_default_dtype(default.get("dtype", before[0]))
        torch.set_default_device(default.get("device", before[1]))
        try:
            found, again = fused_hsd_kl(student, teacher, weight, return_stats=True), gemm._mkl_routine.__wrapped__()
        finally:
            torch.set_default_dtype(before[0])
            torch.set_default_device(None)
        assert torch.equal(found.loss, want.loss) and (again is None) == (routine is None)


def test_an_mkl_that_computes_something_else_is_not_taken(monkeypatch):
    routine = gemm._mkl_routine.__wrapped__
    monkeypatch.setattr(gemm.ctypes, "CDLL", lambda path: types.SimpleNamespace(cblas_gemm_bf16bf16f32=Idle()))
    assert routine() is None
    monkeypatch.setattr(gemm.ctypes, "CDLL", lambda path: types.SimpleNamespace())
    assert routine() is None


def draw(*shape, dtype=BF16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, F64], ids=str)
@pytest.mark.parametrize(("n", "vocab", "dim"), [(1, 1, 1), (1, 200, 3), (5, 127, 8), (33, 300, 70)])
def test_products_accumulate_wide(route, dtype, n, vocab, dim):
    wide = F64 if dtype == F64 else F32
    hidden, weight, dz = draw(n, dim, dtype=dtype), draw(vocab, dim, dtype=dtype), draw(n, vocab, dtype=dtype)
    workspace = torch.full((n, vocab), float("nan"), dtype=wide)
    gemm.project_out(hidden, weight, workspace)
    close = {"rtol": 1e-5, "atol": 1e-4} if wide == F32 else {}
    torch.testing.assert_close(workspace.double(), hidden.double() @ weight.double().T, **close)

    assert gemm.gradient_dtype(hidden, wide) == (BF16 if dtype == BF16 and route != "upcast" else wide)
    narrow = torch.zeros(n, vocab + 5, dtype=gemm.gradient_dtype(hidden, wide))[:, :vocab]
    narrow.copy_(dz)  # rows as in the buffer, apart by more than V
    back = gemm.backproject(narrow, weight, wide)
    assert back.dtype == wide
    torch.testing.assert_close(back.double(), dz.double() @ weight.double(), **close)

    rounded = gemm.backproject(narrow, weight, dtype)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded, back.to(dtype), **close if dtype == F32 else {})

    total = torch.full((vocab, dim), float("nan"), dtype=wide)
    gemm.accumulate_(total, narrow, hidden, first=True)
    gemm.accumulate_(total, narrow, hidden, first=False)
    torch.testing.assert_close(total.double(), 2.0 * dz.double().T @ hidden.double(), **close)


@pytest.mark.parametrize("dim", [0, 1, 2, 7, 33, 512, 1057])  # a sum is of 256 k, or of 512
@pytest.mark.parametrize("vocab", [1, 31, 33, 1000])
@pytest.mark.parametrize("n", [1, 13, 30])
@own_products
def test_logits_by_our_own(by, n, vocab, dim, monkeypatch):
    product, _ = products(by)
    hidden, weight = draw(n, dim + 3)[:, 3:], draw(vocab, dim + 5)[:, 5:]  # rows apart, at odd addresses
    memory = torch.full((n, vocab + 7), float("nan"))
    out = memory[:, 4 : 4 + vocab]
    product(hidden, weight, out)
    exact = hidden.double() @ weight.double().T
    scale = max(exact.abs().max().item(), dim**0.5)  # of the partial sums
    assert_within_budget("logits", out, hidden.float() @ weight.float().T, exact, scale=scale)
    assert memory[:, :4].isnan().all() and memory[:, 4 + vocab :].isnan().all(), "written past the columns"

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    again = torch.full((n, vocab), float("nan"))
    product(hidden, weight, again)
    assert torch.equal(out, again)
    alone = torch.empty(1, 1)
    product(hidden[-1:], weight[-1:], alone)
    assert torch.equal(alone[0, 0], out[-1, -1]), "the order of a sum depends on where it stands"


@pytest.mark.parametrize("n", [0, 1, 2, 33, 256, 515])  # a block of the sum is 256 rows
@pytest.mark.parametrize("vocab", [1, 13, 384, 800])  # a block of V is 384 rows of dW, twelve at a time
@pytest.mark.parametrize("dim", [1, 33, 260])
@own_products
def test_head_gradient_by_our_own(by, n, vocab, dim, monkeypatch):
    _, accumulate = products(by)
    dz, hidden = draw(n, 2 * vocab + 3)[:, 3 : 3 + vocab], draw(n, dim + 5)[:, 5:]  # rows apart, at odd addresses
    memory = torch.full((vocab, dim + 7), float("nan"))
    out = memory[:, 4 : 4 + dim]
    accumulate(dz, hidden, out)
    exact = dz.double().T @ hidden.double()
    scale = max(exact.abs().max().item(), n**0.5, 1.0)
    assert_within_budget("dW", out, dz.float().T @ hidden.float(), exact, scale=scale)
    assert memory[:, :4].isnan().all() and memory[:, 4 + dim :].isnan().all(), "written past the columns"

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    again = torch.full((vocab, dim), float("nan"))
    accumulate(dz, hidden, again)
    assert torch.equal(out, again)
    accumulate(dz, hidden, again, adds=True)
    assert_within_budget("dW of two chunks", again, out + dz.float().T @ hidden.float(), 2.0 * exact, scale=scale)
    alone = torch.empty(1, 1)
    accumulate(dz[:, -1:], hidden[:, -1:], alone)
    assert torch.equal(alone[0, 0], out[-1, -1]), "the order of a sum depends on where it stands"


@own_products
def test_room_for_many_logits(by):
    """Row times stride past 2**31: of the output, on pages that nothing touches but its last two rows."""
    hidden, weight = draw(70, 2), draw(40, 2)
    stride = 2**25
    out = torch.empty(69 * stride + 40).as_strided((70, 40), (stride, 1))
    products(by)[0](hidden, weight, out)
    torch.testing.assert_close(out[-2:].double(), hidden[-2:].double() @ weight.double().T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@own_products
def test_what_is_not_finite_spreads_no_further(by, bad):
    product, accumulate = products(by)
    for dim in (7, 33, 600):
        for i, v, k in [(0, 0, 0), (12, 32, dim - 1), (5, 39, dim // 2)]:
            around, weight = draw(13, dim + 1), draw(40, dim + 1)
            around[:, dim] = weight[:, dim] = float("nan")  # beside the last column of odd dim
            hidden, weight = around[:, :dim], weight[:, :dim]
            hidden[i, k], weight[v, k] = bad, bad
            out = torch.empty(13, 40)
            product(hidden, weight, out)
            torch.testing.assert_close(out, hidden.float() @ weight.float().T, rtol=1e-5, atol=1e-4, equal_nan=True)

    for n in (7, 33, 600):
        for i, v, d in [(0, 0, 0), (n - 1, 39, 12), (n // 2, 17, 5)]:
            below = draw(n + 1, 53)  # a row past the last of odd n
            below[n] = float("nan")
            dz, hidden = below[:n, :40], below[:n, 40:]
            dz[i, v], hidden[i, d] = bad, bad
            out = torch.empty(40, 13)
            accumulate(dz, hidden, out)
            torch.testing.assert_close(out, dz.float().T @ hidden.float(), rtol=1e-5, atol=1e-4, equal_nan=True)


@own_products
def test_what_is_below_the_normal_numbers_is_lost(by):
    """An operand below 2**-126 is 0, however large the other; a product too, even if the sum of two would be normal.
    At 2**-126 and above nothing is lost."""
    (product, _), smallest = products(by), 2.0**-126

    def of(a, w):
        out = torch.full((1, 1), float("nan"))
        product(torch.tensor([a], dtype=BF16), torch.tensor([w], dtype=BF16), out)
        return out.item()

    assert of([smallest], [1.0]) == smallest
    assert of([smallest], [2.0**100]) == 2.0**-26
    assert of([smallest / 2], [2.0**100]) == 0.0
    assert of([2.0**100], [smallest / 2]) == 0.0
    assert of([smallest, smallest], [0.5, 0.5]) == 0.0
    assert of([smallest, 1.0], [0.5, 1.0]) == 1.0


def test_tiles_leave_those_of_torch_as_they_were():
    """torch's products keep the configuration of a thread's tiles from call to call."""
    project_out, _ = products("tiles")
    hidden, weight = draw(40, 96), draw(70, 96)
    want, out = hidden @ weight.T, torch.empty(40, 70)
    for _ in range(3):
        project_out(hidden[:33], weight[:35], out[:33, :35])
        assert torch.equal(hidden @ weight.T, want)


def test_what_lies_between_rows_of_dz_reaches_nothing(route, poisoned_memory):
    """torch's product on AMX reads past a row: 0 * NaN is NaN."""
    student, teacher = draw(64, 64).requires_grad_(), draw(65, 64)[:64]
    for vocab in (4001, 4002, 4016):
        memory._spare[:] = [torch.full((1 << 23,), 255, dtype=torch.uint8)]  # NaN in bf16
        (grad,) = torch.autograd.grad(fused_hsd_kl(student, teacher, draw(vocab, 64)), student)
        assert grad.isfinite().all()


@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_are_rounded_once(route, chunks):
    """dz to bf16 for its products, dH and dW to bf16 in the end: two errors of one size, uncorrelated."""
    student, teacher, weight = draw(48, 32), draw(49, 32)[:48], draw(3000, 32)
    leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = fused_hsd_kl(leaves[0], teacher, leaves[1], memory_bytes=2 * 48 // chunks * 3000 * 4)
    found = torch.autograd.grad(loss, leaves)
    exact = [t.double().requires_grad_() for t in (student, weight)]
    truth = torch.autograd.grad(reference.hsd_kl(exact[0], teacher.double(), exact[1]), exact)
    for got, want in zip(found, truth, strict=True):
        ours, rounding = ((t - want).abs().sum().item() for t in (got, want.to(BF16)))
        assert ours <= 1.1 * 2**0.5 * rounding


@pytest.mark.parametrize("layout", ["transposed", "every second column", "slice"])
def test_head_in_other_layouts(route, layout):
    weight = draw(90, 16)
    odd = {
        "transposed": weight.T.contiguous().T,
        "every second column": torch.stack([weight, weight], -1).flatten(1)[:, ::2],
        "slice": torch.cat([weight, weight], 1)[:, :16],
    }[layout]
    assert torch.equal(odd, weight) and not odd.is_contiguous()
    student, teacher = draw(7, 16), draw(6, 16)[torch.tensor([0, 1, 2, 3, 4, 5, 0])]
    found = []
    for head in (weight, odd):
        leaves = student.clone().requires_grad_(), head.detach().requires_grad_()
        loss = fused_hsd_kl(leaves[0], teacher, leaves[1])
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("layout", ["expanded", "overlapping", "one row"])
def test_rows_that_overlap(route, layout):
    """MKL refuses rows closer than they are long, and says so only by leaving its output unwritten."""
    memory, student, teacher = draw(40, 16), draw(7, 16), draw(8, 16)[:7]
    weight = {
        "expanded": memory[:1].expand(40, 16),
        "overlapping": memory.view(-1).as_strided((90, 16), (3, 1)),
        "one row": memory.as_strided((1, 16), (1, 1)),
    }[layout]
    found = []
    for head in (weight, weight.contiguous().clone()):
        hidden = student.clone().requires_grad_()
        loss = fused_hsd_kl(hidden, teacher, head)
        found.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)


def test_the_workspace_is_kept_and_lent_to_one_caller_at_a_time():
    student, teacher, weight = draw(40, 16, dtype=F32), draw(41, 16, dtype=F32)[:40], draw(500, 16, dtype=F32)
    want = fused_hsd_kl(student, teacher, weight)
    (kept,) = memory._spare
    assert torch.equal(fused_hsd_kl(student, teacher, weight), want)
    assert memory._spare[0].data_ptr() == kept.data_ptr()

    inside = []

    def hook(stats):
        assert not memory._spare  # in use by the outer call
        inside.append(fused_hsd_kl(teacher, student, weight))
        return torch.ones_like(stats.kl)

    assert torch.equal(fused_hsd_kl(student, teacher, weight, token_weight_fn=hook), want)
    assert torch.equal(inside[0], fused_hsd_kl(teacher, student, weight))


def test_threads_do_not_share_a_workspace():
    given = [(draw(60 + i, 16, dtype=F32), draw(160 + i, 16, dtype=F32)[: 60 + i]) for i in range(4)]
    weight = draw(800, 16, dtype=F32)
    want = [fused_hsd_kl(*pair, weight) for pair in given]
    wrong = []

    def work(i):
        for _ in range(25):
            if not torch.equal(fused_hsd_kl(*given[i], weight), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_gradient_that_was_handed_over_is_not_changed_by_the_next():
    """Accumulation into .grad must not write into what is kept for another backward."""
    student, teacher, weight = draw(9, 16, dtype=F32).requires_grad_(), draw(8, 16, dtype=F32), draw(70, 16, dtype=F32)
    teacher = torch.cat([teacher, teacher[:1]])
    weight.requires_grad_()
    loss = fused_hsd_kl(student, teacher, weight)
    first = torch.autograd.grad(loss, (student, weight), retain_graph=True)
    copies = [g.clone() for g in first]
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, copy, kept in zip((student, weight), copies, first, strict=True):
        assert torch.equal(leaf.grad, 3.0 * copy) or torch.allclose(leaf.grad, 3.0 * copy, rtol=1e-6)
        assert torch.equal(kept, copy)
