"""The small world: chains of additions, answered by a Qwen3 of 0.86 M parameters.

A question is `47+38+25+61=`, its solution `47+38=85;85+25=110;110+61=171;#171$`, where `$` ends the sequence. The
registered task adds one-digit numbers, `47+8+5+6=`, which are learned in a third of the warm start's steps;
benchmarks/small_world adds two-digit ones. The warm start teaches the model to add but also to slip: alone, it gets
the tens digit of a result wrong in 30 % of the steps, and later steps go on from the wrong number. With a correct
solution in context it is taught the error-free continuation of *any* prefix: its sequences slip too, but the target
at a slip is the digit that would have been right. A teacher that merely copied its demonstration would ask a rollout
that has left it for impossible steps.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hsd.evaluate import Sampling
from hsd.files import replacing
from hsd.hindsight.context import ContextTemplate
from hsd.padding import padded
from hsd.progress import Progress, counter, hide_bars, say
from hsd.tasks.task import Task

PAD, EOS = "<pad>", "$"
VOCABULARY = (PAD, EOS, *"0123456789+=;#[|]")
EOS_ID = VOCABULARY.index(EOS)

# Privileged contexts, appended to the question: the teacher's sequence is [q ; c ; o].
WITH_PEER = "[{answer}|{demonstration}]"
ANSWER_ONLY = "[{answer}]"
# What the warm start never saw, in the same marks: for methods that show other things.
DEMONSTRATION_ONLY = "[|{demonstration}]"
PARTS = {
    "answer": "[{text}",
    "demonstration": "|{text}",
    "second": "|{text}",
    "failure": "|#{text}",
}
TEMPLATE = ContextTemplate(WITH_PEER, ANSWER_ONLY, DEMONSTRATION_ONLY, parts=PARTS, closing="]")

MAX_COMPLETION = 40  # tokens; a solution of four summands has 37 at most
SLIP_RATE = 0.3  # of the steps, without a solution in context
PREFIX_SLIP_RATE = 0.3  # of the steps in the sequences with one, which are not taught to slip
PLAIN_SHARE, ANSWER_SHARE = 0.4, 0.2  # of the warm-start examples; the rest has a solution in context
TERMS = 4
Bounds = tuple[int, int]
TWO_DIGITS, ONE_DIGIT = (10, 99), (2, 9)  # bounds of the summands after the first
CACHE = Path(".cache")
# A short warm start for the registered task. Without the demonstrations HSD learns nothing after so short a one.
RECIPE: dict[str, Any] = {"learning_rate": 6e-3, "added": ONE_DIGIT, "demonstrations": True}
WARM_STEPS = 800
SAVE_EVERY = 10  # steps of the warm start, a second


def task(seed: int) -> Task:
    """Chains of additions for a Qwen3 of 0.86 M parameters that is made, and warm-started, here."""
    return Task(
        title="small world: chains of additions, Qwen3 with 0.86 M parameters",
        model=partial(warm_started, seed),
        questions=make_questions(2048, seed=seed, added=ONE_DIGIT),
        held_out=make_questions(512, seed=seed, held_out=True, added=ONE_DIGIT),
        rewards=[reward],
        template=TEMPLATE,
        sampling=Sampling(max_new_tokens=MAX_COMPLETION, batch_size=256),
        train={
            "max_steps": 40,
            "save_steps": 10,
            "save_total_limit": 1,  # 10 MB: a finished quick look can go on
            "learning_rate": 3e-4,  # the best of three for HSD and for GRPO (benchmarks/small_world, the pilot)
            "per_device_train_batch_size": 128,  # 16 questions x 8 rollouts
            "teacher": "fixed",  # at this learning rate a live teacher runs away (docs/teachers.md)
            "divergence": "jsd",  # the paper's forward KL ends lower (benchmarks/results/demo/small-forward_kl-seed0)
            "reference_coef": 0.0,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "report_to": "none",
        },
        threads=1,
    )


def warm_started(seed: int) -> str:
    """The folder of the warm-started policy of ``seed``, below `CACHE`; trained there if it is missing."""
    folder = CACHE / f"small_world-{WARM_STEPS}-seed{seed}"
    if not (folder / "config.json").exists():
        say("warm start: teaching a fresh Qwen3 to add, with slips; after Ctrl-C the same command goes on")
        model, tokenizer = build_model(seed), build_tokenizer()
        state = folder.with_suffix(".state")
        progress = counter("warm start")
        warm_start(model, tokenizer, seed=seed, steps=WARM_STEPS, progress=progress, state=state, **RECIPE)
        hide_bars()
        with replacing(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        state.unlink(missing_ok=True)
    return str(folder)


@dataclass(frozen=True)
class Example:
    """One warm-start sequence: `prompt` (question and context) and `solution` (with the eos).

    `targets[i]` is the distribution that character `i` of the solution is trained on; a character that is not
    a key is its own target. Slips are in the targets as well as in the samples: same optimum, less variance.
    """

    prompt: str
    solution: str
    targets: dict[int, dict[str, float]]
    context: int = 0  # characters at the end of the prompt that are trained too


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of `VOCABULARY`; eos `$`, a pad token, no bos. Other characters raise."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def build_model(seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3, fp32: 4 layers, hidden size 128, tied. Leaves the global RNG alone."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=VOCABULARY.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float()


def make_questions(
    n: int, *, seed: int, held_out: bool = False, terms: int = TERMS, added: Bounds = TWO_DIGITS
) -> list[dict[str, str]]:
    """`n` different questions, the same for the same arguments.

    `held_out` chooses the side of the split (`is_held_out`): neither the warm start nor a call with
    `held_out=False` ever draws a held-out question.

    Returns a list of `{"prompt": "47+38+25+61=", "answer": "171"}`.
    """
    if n < 0:
        raise ValueError(f"n: expected a number of questions >= 0, got {n}")
    all_numbers = product(*(range(low, high + 1) for low, high in _bounds(terms, added)))
    there = sum(1 for _ in islice((x for x in all_numbers if is_held_out(_prompt(x)) == held_out), n))
    if there < n:
        raise ValueError(f"n: expected at most {there}, the questions of this side with these summands, got {n}")
    rng, seen, questions = random.Random(f"questions-{seed}"), set(), []
    while len(questions) < n:
        numbers = _draw_numbers(rng, held_out=held_out, terms=terms, added=added)
        prompt = _prompt(numbers)
        if prompt not in seen:
            seen.add(prompt)
            questions.append({"prompt": prompt, "answer": str(sum(numbers))})
    return questions


def reward(
    completions: Sequence[str],
    answer: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1.0 where the completion has exactly one `#`, followed by exactly the answer and the end; else 0.0.

    A TRL reward function. TRL strips `$` from the text, so with `completion_ids` the last token must be the
    eos: a truncated rollout scores 0.
    """
    for name, given in (("answer", answer), ("completion_ids", completion_ids)):
        if given is not None and len(given) != len(completions):
            raise ValueError(f"{name}: expected {len(completions)} entries, got {len(given)}")
    scores = []
    for i, (text, target) in enumerate(zip(completions, answer, strict=True)):
        ended = completion_ids is None or (len(completion_ids[i]) > 0 and completion_ids[i][-1] == EOS_ID)
        _, mark, final = text.removesuffix(EOS).partition("#")
        scores.append(float(ended and mark == "#" and final == target))
    return scores


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int = 2600,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    terms: int = TERMS,
    added: Bounds = TWO_DIGITS,
    demonstrations: bool = False,
    progress: Progress | None = None,
    state: Path | None = None,
) -> list[float]:
    """Supervised training on `draw_example`, in place; repeats exactly for one seed, device and thread count.

    Every `SAVE_EVERY` steps the state of the training is saved to the file ``state``. Where the file exists, the
    training resumes from it, with the numbers of one that was never stopped.

    AdamW (0.9, 0.98), weight decay 0.01, gradient norm clipped at 1, linear warm-up over 5 % of the steps and
    cosine decay to 0. `progress(done, steps)` is called after each step. Returns the losses, cross-entropy in
    nats per character of the solutions.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps, batch_size: expected positive integers, got {steps} and {batch_size}")
    rng = random.Random(f"warm-start-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}
    losses: list[float] = []
    if state is not None and state.exists():
        losses = _load_state(state, rng, stateful, model.device)
    longest = 5 * terms  # characters of a question and an answer, at most; with a solution in context it is far more
    was_training = model.training
    model.train()
    for step in range(len(losses), steps):
        examples = [draw_example(rng, terms, added, demonstrations) for _ in range(batch_size)]
        # Two passes, not one padded to the longest: a sequence with a solution in context is twice as long.
        parts = (
            [e for e in examples if len(e.prompt) <= longest],
            [e for e in examples if len(e.prompt) > longest],
        )
        characters, loss_sum = sum(e.context + len(e.solution) for e in examples), 0.0
        for part in filter(None, parts):
            input_ids, targets = encode_examples(part, tokenizer)
            # Padding is on the right, so the causal mask alone keeps it out.
            logps = model(input_ids=input_ids.to(model.device)).logits[:, :-1].log_softmax(-1)
            loss = -(targets[:, 1:].to(model.device) * logps).sum() / characters
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss_sum)
        if state is not None and (step + 1) % SAVE_EVERY == 0:
            _save_state(state, rng, stateful, losses)
        if progress is not None:
            progress(step + 1, steps)
    model.train(was_training)
    return losses


def _save_state(path: Path, rng: random.Random, stateful: Mapping[str, Any], losses: list[float]) -> None:
    kept: dict[str, Any] = {"rng": rng.getstate(), "losses": losses}
    with replacing(path) as part:
        torch.save(kept | {name: of.state_dict() for name, of in stateful.items()}, part)


def _load_state(path: Path, rng: random.Random, stateful: Mapping[str, Any], device: torch.device) -> list[float]:
    saved = torch.load(path, map_location=device, weights_only=True)
    for name, of in stateful.items():
        of.load_state_dict(saved[name])
    rng.setstate(saved["rng"])
    return saved["losses"]


def draw_example(
    rng: random.Random, terms: int = TERMS, added: Bounds = TWO_DIGITS, demonstrations: bool = False
) -> Example:
    """One warm-start example of a random kind: plain, answer in context, or correct solution in context.

    With ``demonstrations`` the solution in context is trained too: three more additions in the same forward pass.
    """
    numbers = _draw_numbers(rng, held_out=False, terms=terms, added=added)
    prompt, answer = _prompt(numbers), str(sum(numbers))
    kind, sampled, taught, context = rng.random(), SLIP_RATE, SLIP_RATE, 0
    if kind >= PLAIN_SHARE + ANSWER_SHARE:
        demonstration, _ = solve(numbers, rng, slip_rate=0.0)
        prompt, sampled, taught = (
            prompt + WITH_PEER.format(answer=answer, demonstration=demonstration),
            PREFIX_SLIP_RATE,
            0.0,
        )
        context = len(demonstration) + len("]") if demonstrations else 0
    elif kind >= PLAIN_SHARE:
        prompt += ANSWER_ONLY.format(answer=answer)
    solution, tens = solve(numbers, rng, slip_rate=sampled)
    targets = {
        index: {right: 1 - taught} | {digit: taught / len(wrong) for digit in wrong}
        for index, (right, wrong) in tens.items()
    }
    return Example(prompt, solution + EOS, targets, context)


def solve(
    numbers: Sequence[int], rng: random.Random, *, slip_rate: float
) -> tuple[str, dict[int, tuple[str, list[str]]]]:
    """The chain for `numbers`, without the eos; and, by the index of each result's tens digit, the right
    digit and those that a slip can put there.

    A slip moves the digit by one, as if a carry were forgotten or invented; the next step starts from it.
    """
    total, text, tens = numbers[0], "", {}
    for number in numbers[1:]:
        text += f"{total}+{number}="
        result = str(total + number)
        place = len(result) - 2
        right, lowest = result[place], 1 if place == 0 else 0
        wrong = [str(d) for d in (int(right) - 1, int(right) + 1) if lowest <= d <= 9]
        digit = rng.choice(wrong) if rng.random() < slip_rate else right
        tens[len(text) + place] = (right, wrong)
        total = int(result[:place] + digit + result[-1])
        text += f"{total};"
    return f"{text}#{total}", tens


def encode_examples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Input ids `[batch, longest]`, int64, padded on the right, and targets `[batch, longest, vocabulary]`,
    fp32, both on the CPU. `targets[b, t]` is what token `t` is trained on, 0 on the padding and what is not trained.
    """
    encoded = tokenizer([e.prompt + e.solution for e in examples], add_special_tokens=False)["input_ids"]
    input_ids, _ = padded(encoded, VOCABULARY.index(PAD))
    targets = torch.zeros(*input_ids.shape, len(VOCABULARY))
    for row, (example, ids) in enumerate(zip(examples, encoded, strict=True)):
        start = len(example.prompt)
        trained = torch.arange(start - example.context, len(ids))
        targets[row, trained, input_ids[row, trained]] = 1.0
        for index, distribution in example.targets.items():
            targets[row, start + index] = 0.0
            for character, probability in distribution.items():
                targets[row, start + index, VOCABULARY.index(character)] = probability
    return input_ids, targets


def is_held_out(prompt: str) -> bool:
    """Whether a question is kept out of training: a hash of its text chooses one in eight."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def _draw_numbers(rng: random.Random, *, held_out: bool, terms: int, added: Bounds) -> list[int]:
    while True:
        numbers = [rng.randint(*bounds) for bounds in _bounds(terms, added)]
        if is_held_out(_prompt(numbers)) == held_out:
            return numbers


def _bounds(terms: int, added: Bounds) -> tuple[Bounds, ...]:
    return TWO_DIGITS, *[added] * (terms - 1)


def _prompt(numbers: Sequence[int]) -> str:
    return "+".join(map(str, numbers)) + "="
