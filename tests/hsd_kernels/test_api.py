"""What fused_hsd_kl refuses, how it says so, and that importing it needs nothing but torch."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import hsd_kernels
from hsd_kernels import Divergence, Head, HSDKLOutput, fused_hsd_kl, reference, rows
from hsd_kernels.row_stats import COLUMNS
from hsd_kernels.rows import eager as torch_rows

T, D, V = 4, 8, 11
W = torch.ones(V, D)
NAN, INF = float("nan"), float("inf")
NESTED = torch.nested.nested_tensor([torch.ones(2, D), torch.ones(2, D)])


def good(**changes):
    torch.manual_seed(0)
    kwargs = {
        "student_hidden": torch.randn(T, D),
        "teacher_hidden": torch.randn(T, D),
        "head": torch.randn(V, D),
    }
    return kwargs | changes


class Made:
    """Arguments that refuse to be made: they are made inside the call that is tested."""

    def __init__(self, record, *given, **fields):
        self.make = lambda: record(*given, **fields)


def grad(*shape):
    return torch.randn(*shape, requires_grad=True)


def weights(value):
    return torch.tensor([1.0, value, 0.0, 1.0])


VALUE_ERRORS = {
    "student is a scalar": ({"student_hidden": torch.tensor(1.0)}, "student_hidden", "(..., D)", "scalar"),
    "student D": ({"student_hidden": torch.randn(T, D + 1)}, "student_hidden", "(..., 8)", "(4, 9)"),
    "teacher D": ({"teacher_hidden": torch.randn(T, D + 1)}, "teacher_hidden", "(4, 8)", "(4, 9)"),
    "teacher tokens": ({"teacher_hidden": torch.randn(T + 1, D)}, "teacher_hidden", "(4, 8)", "(5, 8)"),
    "teacher leading shape": ({"teacher_hidden": torch.randn(2, 2, D)}, "teacher_hidden", "(4, 8)", "(2, 2, 8)"),
    "weight 1-d": ({"head": torch.randn(D)}, "head.weight", "(V, D)", "(8,)"),
    "weight 3-d": ({"head": torch.randn(1, V, D)}, "head.weight", "(V, D)", "(1, 11, 8)"),
    "empty vocabulary": ({"head": torch.randn(0, D)}, "head.weight", "V > 0", "(0, 8)"),
    "bias": ({"head": Head(W, torch.randn(V + 1))}, "head.bias", "(11,)", "(12,)"),
    "bias 2-d": ({"head": Head(W, torch.randn(1, V))}, "head.bias", "(11,)", "(1, 11)"),
    "teacher weight V": ({"teacher_head": torch.randn(V - 1, D)}, "teacher_head.weight", "(11, D')", "(10, 8)"),
    "teacher weight 1-d": ({"teacher_head": torch.randn(V)}, "teacher_head.weight", "(11, D')", "(11,)"),
    "teacher weight D": ({"teacher_head": torch.randn(V, 5)}, "teacher_hidden", "(4, 5)", "(4, 8)"),
    "teacher bias": ({"teacher_head": Head(W, torch.randn(3))}, "teacher_head.bias", "(11,)", "(3,)"),
    "teacher scale": (
        {"teacher_head": Head(W, logit_scale=2.0)},
        "teacher_head.logit_scale",
        "head.logit_scale, 1.0",
        "2.0",
    ),
    "reference cap": (
        {"head": Head(W, softcap=3.0), "reference_head": Head(W)},
        "reference_head.softcap",
        "head.softcap, 3.0",
        "None",
    ),
    "reference head alone": ({"reference_head": W}, "reference_head", "None without reference_hidden", "a head"),
    "reference hidden alone": (
        {"reference_hidden": torch.randn(T, D)},
        "reference_hidden",
        "> 0",
        "reference_coef=0.0",
    ),
    "reference coef alone": ({"reference_coef": 0.1}, "reference_hidden", "a tensor with", "None"),
    "reference coef": ({"reference_coef": -0.1}, "reference_coef", ">= 0", "-0.1"),
    "teacher hidden grad": ({"teacher_hidden": grad(T, D)}, "teacher_hidden", "without gradient", "requires_grad"),
    "teacher weight grad": ({"teacher_head": grad(V, D)}, "teacher_head.weight", "without gradient", "requires_grad"),
    "teacher bias grad": ({"teacher_head": Head(W, grad(V))}, "teacher_head.bias", "without gradient", "requires_grad"),
    "teacher device": ({"teacher_hidden": torch.randn(T, D, device="meta")}, "teacher_hidden", "cpu", "meta"),
    "student device": ({"student_hidden": torch.randn(T, D, device="meta")}, "teacher_hidden", "meta", "cpu"),
    "weight device": ({"head": torch.randn(V, D, device="meta")}, "head.weight", "cpu", "meta"),
    "bias device": ({"head": Head(W, torch.randn(V, device="meta"))}, "head.bias", "cpu", "meta"),
    "weights device": ({"token_weights": torch.ones(T, device="meta")}, "token_weights", "cpu", "meta"),
    "targets device": ({"target_ids": torch.ones(T, device="meta").long()}, "target_ids", "cpu", "meta"),
    "divergence": ({"divergence": "js"}, "divergence.kind", "forward_kl", "'js'"),
    "clip_form": ({"divergence": Made(Divergence, clip_form="both")}, "divergence.clip_form", "opsd", "'both'"),
    "reduction": ({"reduction": "batchmean"}, "reduction", "mean", "'batchmean'"),
    "impl": ({"impl": "cuda"}, "impl", "triton", "'cuda'"),
    "impl None": ({"impl": None}, "impl", "triton", "None"),
    "beta below": ({"divergence": Made(Divergence, "jsd", beta=-0.1)}, "divergence.beta", "[0, 1]", "-0.1"),
    "beta above": ({"divergence": Made(Divergence, beta=1.5)}, "divergence.beta", "[0, 1]", "1.5"),
    "beta nan": ({"divergence": Made(Divergence, beta=NAN)}, "divergence.beta", "[0, 1]", "nan"),
    "temperature negative": (
        {"divergence": Made(Divergence, temperature=-1.0)},
        "divergence.temperature",
        "> 0",
        "-1.0",
    ),
    "temperature zero": ({"divergence": Made(Divergence, temperature=0)}, "divergence.temperature", "> 0", "0"),
    "temperature nan": ({"divergence": Made(Divergence, temperature=NAN)}, "divergence.temperature", "finite", "nan"),
    "temperature inf": ({"divergence": Made(Divergence, temperature=INF)}, "divergence.temperature", "finite", "inf"),
    "clip": ({"divergence": Made(Divergence, clip=-1.0)}, "divergence.clip", "> 0", "-1.0"),
    "clip zero": ({"divergence": Made(Divergence, clip=0.0)}, "divergence.clip", "> 0", "0.0"),
    "softcap": ({"head": Made(Head, W, softcap=0.0)}, "head.softcap", "> 0", "0.0"),
    "logit_scale": ({"head": Made(Head, W, logit_scale=INF)}, "head.logit_scale", "finite", "inf"),
    "num_items": ({"num_items": 0}, "num_items", "> 0", "0"),
    "num_items nan": ({"num_items": NAN}, "num_items", "> 0", "nan"),
    "memory_bytes zero": ({"memory_bytes": 0}, "memory_bytes", "> 0", "0"),
    "memory_bytes negative": ({"memory_bytes": -1}, "memory_bytes", "> 0", "-1"),
    "memory_bytes huge": ({"memory_bytes": 2**63}, "memory_bytes", "below 2^63", str(2**63)),
    "top_k huge": ({"divergence": Made(Divergence, top_k=2**63)}, "divergence.top_k", "below 2^63", str(2**63)),
    "num_items huge": ({"num_items": 10**400}, "num_items", "below 2^63", "1000"),
    "too cold": ({"divergence": Divergence(temperature=1e-39)}, "divergence.temperature", "float32's range", "1e-39"),
    "too hot": ({"divergence": Divergence(temperature=1e39)}, "divergence.temperature", "float32's range", "1e+39"),
    "scale too large": ({"head": Head(W, logit_scale=1e39)}, "divergence.temperature", "float32's range", "1e+39"),
    "cap too small": ({"head": Head(W, softcap=1e-39)}, "divergence.temperature", "float32's range", "1e-39"),
    "floor": ({"divergence": Made(Divergence, floor=1e39)}, "divergence.floor", "at most 1e38", "1e+39"),
    "filter_eps huge": ({"filter_eps": 10**400}, "filter_eps", "below 2^63", "1000"),
    "reduction list": ({"reduction": ["mean"]}, "reduction", "mean", "['mean']"),
    "weights shape": ({"token_weights": torch.ones(T, 1)}, "token_weights", "(4,)", "(4, 1)"),
    "weights nan": ({"token_weights": weights(NAN)}, "token_weights", "finite", "1 that are NaN"),
    "weights inf": ({"token_weights": weights(INF)}, "token_weights", "finite", "1 that are NaN or infinite"),
    "weights grad": ({"token_weights": grad(T)}, "token_weights", "without gradient", "requires_grad"),
    "targets shape": ({"target_ids": torch.zeros(T + 1).long()}, "target_ids", "(4,)", "(5,)"),
    "targets high": ({"target_ids": torch.tensor([0, 1, V, 2])}, "target_ids", "[0, 11)", "0 to 11"),
    "targets low": ({"target_ids": torch.tensor([0, 1, -100, 2])}, "target_ids", "[0, 11)", "-100 to 2"),
    "hook shape": ({"token_weight_fn": lambda s: s.kl[:-1]}, "token_weight_fn", "(4,)", "(3,)"),
    "hook 2-d": ({"token_weight_fn": lambda s: s.kl[:, None]}, "token_weight_fn", "(4,)", "(4, 1)"),
    "hook complex": ({"token_weight_fn": lambda s: s.kl + 0j}, "token_weight_fn", "real numbers", "complex64"),
    "hook number": ({"token_weight_fn": lambda s: 1.0}, "token_weight_fn", "(4,)", "float"),
}
TYPE_ERRORS = {
    "student array": ({"student_hidden": [[1.0] * D] * T}, "student_hidden", "torch.Tensor", "list"),
    "student None": ({"student_hidden": None}, "student_hidden", "torch.Tensor", "NoneType"),
    "teacher None": ({"teacher_hidden": None}, "teacher_hidden", "torch.Tensor", "NoneType"),
    "head list": ({"head": [[0.0]]}, "head", "a torch.Tensor or a Head", "list"),
    "weight list": ({"head": Made(Head, [[0.0]])}, "head.weight", "torch.Tensor", "list"),
    "bias number": ({"head": Made(Head, W, 0.0)}, "head.bias", "torch.Tensor or None", "float"),
    "teacher head": ({"teacher_head": "ema"}, "teacher_head", "a torch.Tensor, a Head or None", "str"),
    "divergence None": ({"divergence": None}, "divergence", "a Divergence or one of ('forward_kl'", "NoneType"),
    "student ints": ({"student_hidden": torch.ones(T, D).long()}, "student_hidden", "float32", "int64"),
    "student complex": ({"student_hidden": torch.ones(T, D) + 0j}, "student_hidden", "float32", "complex64"),
    "student sparse": ({"student_hidden": torch.ones(T, D).to_sparse()}, "student_hidden", "dense", "sparse_coo"),
    "teacher nested": ({"teacher_hidden": NESTED}, "teacher_hidden", "dense", "nested"),
    "weights sparse": ({"token_weights": torch.ones(T).to_sparse()}, "token_weights", "dense", "sparse_coo"),
    "no process group": ({"process_group": "world"}, "process_group", "a ProcessGroup", "world"),
    "not in the process group": ({"process_group": -100}, "process_group", "a member", "-100 (int)"),
    "filter_eps array": ({"filter_eps": torch.ones(2)}, "filter_eps", "a number", "tensor"),
    "weight dtype": ({"head": torch.randn(V, D).bfloat16()}, "head.weight", "float32", "bfloat16"),
    "teacher dtype": ({"teacher_hidden": torch.randn(T, D).half()}, "teacher_hidden", "float32", "float16"),
    "bias dtype": ({"head": Head(W, torch.randn(V).double())}, "head.bias", "float32", "float64"),
    "weights list": ({"token_weights": [1.0] * T}, "token_weights", "torch.Tensor or None", "list"),
    "weights complex": ({"token_weights": torch.ones(T) + 0j}, "token_weights", "real", "complex64"),
    "targets float": ({"target_ids": torch.zeros(T)}, "target_ids", "integers", "float32"),
    "targets bool": ({"target_ids": torch.zeros(T).bool()}, "target_ids", "integers", "bool"),
    "targets list": ({"target_ids": [0] * T}, "target_ids", "torch.Tensor or None", "list"),
    "hook": ({"token_weight_fn": torch.ones(T)}, "token_weight_fn", "callable or None", "Tensor"),
    "memory_bytes float": ({"memory_bytes": 1e6}, "memory_bytes", "an integer or None", "1000000.0 (float)"),
    "num_items tensor": ({"num_items": torch.tensor(3)}, "num_items", "a number or None", "tensor(3)"),
}
FIELDS = {"beta": Divergence, "temperature": Divergence, "clip": Divergence, "logit_scale": Head, "softcap": Head}
for name in (*FIELDS, "num_items", "memory_bytes", "reference_coef"):
    for kind, value in {"str": "hot", "bool": True, "list": [1.0], "None": None}.items():
        if kind == "None" and name in ("clip", "softcap", "num_items", "memory_bytes"):
            continue
        argument, changes = name, {name: value}
        if name in FIELDS:
            made = Made(Divergence, **{name: value}) if FIELDS[name] is Divergence else Made(Head, W, **{name: value})
            owner = FIELDS[name].__name__.lower()
            argument, changes = f"{owner}.{name}", {owner: made}
        TYPE_ERRORS[f"{name} {kind}"] = (changes, argument, "expected a", f"{value!r} ({type(value).__name__})")


def is_dense(t):
    return t.layout == torch.strided and not t.is_nested


def check_refused(kind, changes, argument, expected, got):
    kwargs = good(**changes)
    tensors = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor) and not v.is_meta and is_dense(v)}
    before = {k: (v.detach().clone(), v._version) for k, v in tensors.items()}
    with pytest.raises(kind) as error:
        fused_hsd_kl(**{k: v.make() if isinstance(v, Made) else v for k, v in kwargs.items()})
    message = str(error.value)
    assert message.startswith((f"{argument}: expected", f"{argument}=")), message
    assert expected in message and got in message, message
    for name, (values, version) in before.items():
        same = torch.allclose(tensors[name].detach(), values, rtol=0.0, atol=0.0, equal_nan=True)
        assert same and tensors[name]._version == version, name


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_value_error_names_argument_expectation_and_value(case):
    changes, argument, expected, got = VALUE_ERRORS[case]
    check_refused(ValueError, changes, argument, expected, got)


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_type_error_names_argument_expectation_and_value(case):
    changes, argument, expected, got = TYPE_ERRORS[case]
    check_refused(TypeError, changes, argument, expected, got)


def test_triton_without_cuda_is_refused_and_does_not_fall_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^impl='triton': expected .*(CUDA tensors|triton to be installed)"):
        fused_hsd_kl(**good(impl="triton"))


def pretend_triton(monkeypatch, spec):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "triton" else real(name, *a))


def test_triton_missing_is_refused_and_auto_uses_torch(monkeypatch):
    pretend_triton(monkeypatch, None)
    with pytest.raises(ValueError, match=r"^impl='triton': expected triton to be installed"):
        fused_hsd_kl(**good(impl="triton"))
    assert rows.resolve("auto", torch.device("cuda"), torch.float32) is torch_rows


def test_triton_in_double_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pretend_triton(monkeypatch, object())
    kwargs = {k: v.double() for k, v in good().items()}
    with pytest.raises(TypeError, match=r"^impl='triton': expected float32, .* got float64"):
        fused_hsd_kl(**kwargs, impl="triton")


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch built without distributed")
@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden", "head"])
def test_dtensor_is_refused_with_the_way_out(mesh, name):
    from torch.distributed.tensor import Shard, distribute_tensor

    kwargs = good()
    kwargs[name] = distribute_tensor(kwargs[name], mesh, [Shard(0)])
    with pytest.raises(TypeError, match=rf"^{name}(.weight)?: expected a plain tensor, got a DTensor.*gathered"):
        fused_hsd_kl(**kwargs)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_inputs_are_not_changed(reduction):
    kwargs = good(
        student_hidden=grad(T, D),
        token_weights=weights(0.5),
        target_ids=torch.tensor([0, 1, 2, 10]),
    )
    head = Head(grad(V, D), grad(V), softcap=3.0)
    tensors = {k: v for k, v in kwargs.items() if k != "head"} | {"weight": head.weight, "bias": head.bias}
    before = {k: v.detach().clone() for k, v in tensors.items()}
    divergence = Divergence("jsd", temperature=0.7)
    fused_hsd_kl(**kwargs | {"head": head}, reduction=reduction, divergence=divergence).sum().backward()
    for name, old in before.items():
        assert torch.equal(tensors[name].detach(), old) and tensors[name]._version == 0, name


def test_numbers_of_any_real_type_are_accepted():
    numpy = pytest.importorskip("numpy")
    expected = fused_hsd_kl(**good(divergence=Divergence(temperature=2.0), num_items=3.0))
    for real, integer in ((int, int), (numpy.float64, numpy.int64), (numpy.float32, numpy.int32)):
        given = {"num_items": integer(3), "memory_bytes": integer(4096)}
        got = fused_hsd_kl(**good(divergence=Divergence(temperature=real(2)), **given))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int32])
def test_target_ids_of_any_integers(dtype):
    student, teacher, weight = torch.randn(2, 4), torch.randn(2, 4), torch.randn(100, 4)
    found, want = (
        fused_hsd_kl(student, teacher, weight, target_ids=ids, return_stats=True).stats.student_logps
        for ids in (torch.tensor([7, 99]).to(dtype), torch.tensor([7, 99]))
    )
    assert found.equal(want)
    with pytest.raises(ValueError, match=r"^target_ids: expected values in \[0, 100\), got 7 to 100$"):
        fused_hsd_kl(student, teacher, weight, target_ids=torch.tensor([7, 100]).to(dtype))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_output_shapes_dtypes_and_gradients(shape):
    hidden, teacher, weight = grad(*shape, D), torch.randn(*shape, D), grad(V, D)
    ids = torch.zeros(shape, dtype=torch.long)
    out = fused_hsd_kl(hidden, teacher, weight, target_ids=ids, return_stats=True)
    assert isinstance(out, HSDKLOutput) and out.loss.shape == () and out.loss.requires_grad
    assert out.reference is None and out.filtered_share is None
    for name in COLUMNS:
        value = getattr(out.stats, name)
        assert value.dtype == torch.float32 and value.shape == shape and not value.requires_grad, name
    assert torch.equal(out.stats.rows, torch.arange(len(out.stats.kl.flatten())).reshape(shape))
    terms = fused_hsd_kl(hidden, teacher, weight, reduction="none")
    assert terms.shape == shape
    terms.sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_dtypes(dtype):
    hidden, teacher, weight, bias = (t.to(dtype) for t in (*good().values(), torch.randn(V)))
    trained = [t.requires_grad_() for t in (hidden, weight, bias)]
    out = fused_hsd_kl(hidden, teacher, Head(weight, bias), return_stats=True)
    assert out.stats.student_logps is None and out.stats.teacher_logps is None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (out.loss, *out.stats[1:]) if t is not None} == {wide}
    out.loss.backward()
    assert {t.grad.dtype for t in trained} == {dtype}


def test_public_names():
    assert set(hsd_kernels.__all__) == {
        "Divergence",
        "FusedHSDKL",
        "HSDKLOutput",
        "Head",
        "RowStats",
        "TokenLossOutput",
        "fused_hsd_kl",
        "fused_token_logps",
        "fused_token_loss",
        "gathered",
        "release_memory",
    }
    assert all(hasattr(hsd_kernels, name) for name in hsd_kernels.__all__)


IMPORT_ALONE = """
import sys

BLOCKED = {"triton", "trl", "transformers", "peft", "accelerate", "datasets", "matplotlib"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Block())
import torch
from hsd_kernels import fused_hsd_kl

hidden = torch.randn(3, 4, requires_grad=True)
loss = fused_hsd_kl(hidden, torch.randn(3, 4), torch.randn(7, 4, requires_grad=True))
loss.backward()
assert loss > 0 and hidden.grad.abs().max() > 0
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
print("alone")
"""


def test_import_and_loss_with_torch_alone():
    ran = subprocess.run([sys.executable, "-c", IMPORT_ALONE], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout == "alone\n", ran.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form", [{"temperature": 1e-37}, {"temperature": 1e37}, {"softcap": 1e37}, {"logit_scale": 1e-37}]
)
def test_factors_of_logits_up_to_the_range_of_fp32(form, dtype):
    tensors = {name: 1e-2 * t for name, t in good().items()}
    head_form = {name: form[name] for name in ("softcap", "logit_scale") if name in form}
    divergence = Divergence(temperature=form.get("temperature", 1.0))

    def loss(function, dtype):
        head = Head(tensors["head"].to(dtype), **head_form)
        hidden = (tensors[name].to(dtype) for name in ("student_hidden", "teacher_hidden"))
        return function(*hidden, head, divergence=divergence).double()

    exact = loss(reference.hsd_kl, torch.float64)
    torch.testing.assert_close(loss(fused_hsd_kl, dtype), exact, rtol=0.1, atol=1e-7)


@pytest.mark.parametrize("numbers", [{"memory_bytes": 2**63 - 1}, {"memory_bytes": 1}, {"top_k": 2**63 - 1}], ids=str)
def test_extreme_integers(numbers):
    divergence = Divergence(top_k=numbers.get("top_k"))
    memory = {name: value for name, value in numbers.items() if name != "top_k"}
    torch.testing.assert_close(fused_hsd_kl(**good(divergence=divergence), **memory), fused_hsd_kl(**good()))


@pytest.mark.parametrize("floor", [1e-38, 1.0, 1e30])
def test_extreme_floors(floor):
    options = {"divergence": Divergence("reverse_kl", floor=floor)}
    exact = reference.hsd_kl(**{name: t.double() for name, t in good().items()}, **options)
    torch.testing.assert_close(fused_hsd_kl(**good(), **options).double(), exact, rtol=1e-4, atol=1e-6)
