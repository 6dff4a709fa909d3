"""FusedOPSD against an independent computation of OPSD's loss on a batch as its collator and generation make it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import TOKENIZER, start_adapters, with_lora

from hsd.adapters.opsd import FusedOPSD

VOCAB = len(TOKENIZER)
PAD = 0


class Theirs:
    """What FusedOPSD uses of OPSDTrainer, and a ``compute_loss`` that says it was called."""

    def __init__(self, **options):
        defaults = {"beta": 0.5, "temperature": 1.0, "top_k_loss": None, "use_thinking_machines_loss": False}
        teachers = {"fixed_teacher": False, "use_ema_teacher": False}
        self.__dict__.update(defaults | teachers | options)
        autocast = torch.autocast("cpu", enabled=False)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=lambda: autocast)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return "theirs"

    @contextmanager
    def _ema_teacher_context(self, model):
        """Swaps the storage of every parameter, as theirs does."""
        saved = {n: p.data for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            p.data = self.ema[n]
        yield
        for n, p in model.named_parameters():
            p.data = saved[n]


class Trainer(FusedOPSD, Theirs):
    pass


@pytest.fixture
def inputs():
    """Prompts padded on the right to the batch's longest, the same completion behind both, pads after its end."""
    g = torch.Generator().manual_seed(0)

    def prompts(lengths):
        width = max(lengths)
        live = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        return torch.randint(2, VOCAB, (len(lengths), width), generator=g) * live

    student, teacher = prompts([3, 6, 4]), prompts([9, 5, 7])
    live = torch.arange(8)[None] < torch.tensor([8, 5, 1])[:, None]
    completion = torch.randint(2, VOCAB, (3, 8), generator=g) * live
    student_ids, teacher_ids = (torch.cat([p, completion], 1) for p in (student, teacher))
    labels = student_ids.clone()
    labels[:, :6] = -100
    labels[labels == PAD] = -100
    return {
        "student_input_ids": student_ids,
        "student_attention_mask": (student_ids != PAD).long(),
        "student_prompt_length": 6,
        "teacher_input_ids": teacher_ids,
        "teacher_attention_mask": (teacher_ids != PAD).long(),
        "teacher_prompt_length": 9,
        "labels": labels,
    }


def opsd_loss(student, teacher, inputs, beta, temperature, clip=None):
    """From the paper's equation (arXiv 2601.18734) and full logits: no line of the adapter or of theirs."""

    def log_probs(model, side):
        ids, mask = inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits
        return (logits[:, inputs[f"{side}_prompt_length"] - 1 : -1] / temperature).log_softmax(-1)

    ls = log_probs(student, "student")
    with torch.no_grad():
        lt = teacher()(log_probs)
    ps, pt = ls.exp(), lt.exp()
    if beta == 0:
        terms = pt * (lt - ls)
    elif beta == 1:
        terms = ps * (ls - lt)
    else:
        lm = (beta * pt + (1 - beta) * ps).log()
        terms = beta * pt * (lt - lm) + (1 - beta) * ps * (ls - lm)
    if clip is not None:
        terms = terms.clamp(max=clip)
    counted = inputs["labels"][:, inputs["student_prompt_length"] :] != -100
    return terms.sum(-1)[counted].mean()


def live(model):
    return lambda: lambda log_probs: log_probs(model, "teacher")


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    ("beta", "temperature", "clip"),
    [(0.0, 1.0, None), (0.5, 1.1, None), (1.0, 0.7, None), (0.0, 1.1, 0.02), (0.3, 1.0, 0.01)],
)
def test_loss_and_gradient(family, beta, temperature, clip, build, inputs, gradients, assert_same):
    model = build(family)
    trainer = Trainer(beta=beta, temperature=temperature, jsd_token_clip=clip)
    ours = gradients(model, lambda: trainer.compute_loss(model, inputs))
    theirs = gradients(model, lambda: opsd_loss(model, live(model), inputs, beta, temperature, clip))
    assert_same(ours, theirs)


def test_the_clip_is_pointwise_and_may_make_the_loss_negative(build, inputs):
    model = build()
    assert Trainer(beta=0.0, jsd_token_clip=1e-4).compute_loss(model, inputs) < 0
    assert Trainer(beta=0.0).compute_loss(model, inputs) > 0


def test_versions_without_the_clip(build, inputs):
    model = build()
    a, b = Trainer().compute_loss(model, inputs), Trainer(jsd_token_clip=None).compute_loss(model, inputs)
    assert a == b


def test_fixed_teacher_is_the_policy_without_its_adapter(build, inputs, gradients, assert_same):
    torch.manual_seed(0)
    model = with_lora(build())
    start_adapters(model, std=0.1)
    trainer = Trainer(beta=0.0, fixed_teacher=True)

    def teacher():
        def run(log_probs):
            with model.disable_adapter():
                return log_probs(model, "teacher")

        return run

    ours = gradients(model, lambda: trainer.compute_loss(model, inputs))
    assert_same(ours, gradients(model, lambda: opsd_loss(model, teacher, inputs, 0.0, 1.0)))


@pytest.mark.parametrize("family", ["qwen3", "phi"])  # tied, and with a bias
def test_ema_teacher_has_a_head_of_its_own(family, build, inputs, gradients, assert_same):
    model, twin = build(family), build(family, seed=5)
    trainer = Trainer(beta=0.5, use_ema_teacher=True)
    trainer.ema = {n: p.detach().clone() for n, p in twin.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ours = gradients(model, lambda: trainer.compute_loss(model, inputs))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert_same(ours, gradients(model, lambda: opsd_loss(model, live(twin), inputs, 0.5, 1.0)))


def test_top_k_and_the_sampled_token_loss_are_theirs(build, inputs):
    model = build()
    assert Trainer(top_k_loss=5).compute_loss(model, inputs) == "theirs"
    assert Trainer(use_thinking_machines_loss=True).compute_loss(model, inputs) == "theirs"


def test_return_outputs(build, inputs):
    model = build()
    loss, outputs = Trainer().compute_loss(model, inputs, return_outputs=True)
    assert outputs.loss is loss


def test_a_batch_without_tokens_is_0(build, inputs):
    model = build()
    loss = Trainer().compute_loss(model, inputs | {"labels": torch.full_like(inputs["labels"], -100)})
    loss.backward()
    assert loss == 0.0 and not any(p.grad.any() for p in model.parameters())


def test_no_dense_logits(build, inputs, head_calls):
    model, trainer = build(), Trainer()
    trainer.compute_loss(model, inputs)
    assert head_calls(model, lambda: trainer.compute_loss(model, inputs)) == 0
