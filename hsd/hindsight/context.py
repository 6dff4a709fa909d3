"""The privileged context ``c_i`` in the teacher's prompt ``[q ; c_i]`` (arXiv 2606.15576).

``c_i = (a*, o_i+)`` when rollout i has a successful peer, else ``c_i = a*`` (endpoint fallback). Other methods show a
demonstration alone, or feedback. The context is appended to the question, so the teacher's prompt shares the
question's tokens with the student's.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from hsd.hindsight.groups import Prompt, last_user_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fields_of(name: str, template: str) -> set[str]:
    """The fields of a ``str.format`` template. Raises ValueError, which begins with ``name``, for a broken one."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{name}: expected a str.format template, got {template!r} ({error})") from error
    # "{answer!r:>8}" is written back in full, so that it counts as another field than "{answer}".
    return {
        field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, field, spec, conversion in parsed
        if field is not None
    }


def _check_fields(name: str, template: str, required: set[str]) -> None:
    fields = fields_of(name, template)
    if fields - {"question"} != required:
        raise ValueError(
            f"{name}: expected exactly the fields {sorted(required)}, and question if wanted, got {sorted(fields)}"
        )


PARTS = {
    "answer": "\n\nReference answer: {text}",
    "demonstration": "\n\nA correct solution:\n{text}",
    "second": "\n\nAnother correct solution:\n{text}",
    "failure": "\n\nAn attempt that is known to fail:\n{text}",
    "feedback": "\n\nFeedback on an attempt:\n{text}",
    "verdict": "\n\nThe attempt that follows is {text}.",
    "unrelated": "\n\nA correct solution to another problem:\n{text}",
    "hint": "\n\nHint: {text}",
    "translation": "\n\nThe same problem in English:\n{text}\n\nThink in English.",
    "tag": "\n\nNote on the attempt that follows: {text}",
    "critique": "\n\nA critique of the attempt that follows:\n{text}",
    "rubric": "\n\nRubric:\n{text}",
    "analysis": "\n\nWhat the rubric asks for:\n{text}",
    "plan": "\n\nA plan:\n{text}",
    "playbook": "\n\nNotes from earlier problems:\n{text}",
    "attempt": "\n\nAn earlier attempt:\n{text}",
    "reflection": "\n\nWhat to learn from it:\n{text}",
    "head": "\n\nThe beginning of a reference solution:\n{text}",
}


@dataclass(frozen=True)
class ContextTemplate:
    """The words of the privileged context: ``str.format`` templates, appended to the question.

    Any of them may repeat the question's text as ``{question}``: a context can be an earlier turn, which asks again.

    Args:
        with_peer: Must use both ``{answer}`` and ``{demonstration}``: ``a*`` stays explicit even with a peer,
            which steadies the teacher after the divergence position.
        answer_only: Must use ``{answer}`` and must not use ``{demonstration}``.
        demonstration_only: Must use ``{demonstration}`` only: methods that do not show the answer.
        feedback_only: Must use ``{feedback}`` only: what the environment said about this rollout.
        parts: By kind, the wording of its ``{text}``, for contexts of other kinds than answer, demonstration and
            feedback: one follows the other in the context's order.
        closing: Ends these parts.

    Raises:
        ValueError: A template lacks a field it must use, uses another one, or is not a valid format string.
    """

    with_peer: str
    answer_only: str
    demonstration_only: str = (
        "\n\nHere is a correct solution to the same problem.\n\n"
        "Correct solution:\n{demonstration}\n\n"
        "Now solve the problem in your own words."
    )
    feedback_only: str = (
        "\n\nHere is feedback on an earlier, unsuccessful attempt at the problem.\n\n"
        "Feedback:\n{feedback}\n\n"
        "Now solve the problem in your own words."
    )

    parts: Mapping[str, str] = field(default_factory=lambda: PARTS)
    closing: str = "\n\nNow solve the problem in your own words."

    def __post_init__(self) -> None:
        for kind, wording in self.parts.items():
            _check_fields(f"parts[{kind!r}]", wording, {"text"})
        _check_fields("with_peer", self.with_peer, {"answer", "demonstration"})
        _check_fields("closing", self.closing, set())
        for kind in ("answer", "demonstration", "feedback"):
            _check_fields(f"{kind}_only", getattr(self, f"{kind}_only"), {kind})


DEFAULT_CHAT_TEMPLATE = ContextTemplate(
    with_peer=(
        "\n\nHere is the reference answer and a correct solution to the same problem.\n\n"
        "Reference answer: {answer}\n\n"
        "Correct solution:\n{demonstration}\n\n"
        "Now solve the problem in your own words."
    ),
    answer_only=(
        "\n\nHere is the reference answer to the problem.\n\n"
        "Reference answer: {answer}\n\n"
        "Now solve the problem in your own words."
    ),
)

# For plain-string prompts the rollout follows the context directly, so this one ends by opening the solution.
DEFAULT_TEXT_TEMPLATE = ContextTemplate(
    **{
        name: wording + "\n\nSolution:"
        for name, wording in vars(DEFAULT_CHAT_TEMPLATE).items()
        if name != "parts"  # the closing follows them
    }
)


Content = Sequence[int] | str  # token ids as sampled, or a text
OWN_WORDS = {"answer", "demonstration", "feedback"}  # kinds that have wordings of their own where there are no others


@dataclass(frozen=True)
class Context:
    """What one teacher is shown beside the question.

    Args:
        parts: (kind, token ids or text), in the order in which they are shown. Those that say nothing are left out. An
            answer, a demonstration and a feedback alone have the wordings of `ContextTemplate`, others its ``parts``.
        question: Asked of the teacher in place of the student's question.
        cut: Kinds that are cut, then left out, where the prompt is too long, the first one first; by default all but
            the answer, the last part first.
    """

    parts: tuple[tuple[str, Content], ...] = ()
    question: Prompt | None = None
    cut: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PrivilegedContext:
    """A teacher prompt ``[q ; c_i]``, ready for the rollout's tokens to be appended.

    Attributes:
        prompt_ids: The token ids of the whole teacher prompt.
        kind: ``"peer"`` when a demonstration is in it, ``"answer_only"``, ``"feedback"``, ``"other"``, or
            ``"nothing"``: the student's question alone.
        truncated: Whether a part was cut, or left out altogether, to fit ``max_length``.
    """

    prompt_ids: tuple[int, ...]
    kind: Literal["peer", "answer_only", "feedback", "other", "nothing"]
    truncated: bool


def build_context(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str | None,
    demonstration: Sequence[int] | str | None,
    template: ContextTemplate,
    *,
    feedback: str | None = None,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PrivilegedContext:
    """The teacher's prompt: ``prompt`` with the context appended, tokenized as the student's prompt is.

    A string is extended directly; with chat messages the context goes to the end of the last message, which
    must be the user's. ``prompt`` is not modified.

    Args:
        tokenizer: Must have a chat template when ``prompt`` is a list of messages.
        prompt: The question ``q``.
        answer: The ground-truth answer ``a*``; braces in it are plain characters. None or a blank one is not shown.
        demonstration: Token ids of the peer ``o_i+``, or a text. None, or ids that decode to nothing but white
            space and special tokens, leave the answer, else the feedback, else nothing.
        template: The wording.
        feedback: Shown where there is neither a demonstration nor an answer.
        max_length: Limit on the teacher prompt in tokens, rollout excluded. To fit, the tail of the
            demonstration (or feedback) is cut, never the question nor the answer; when no token of it fits, it is
            left out.
        chat_template_kwargs: Passed to ``tokenizer.apply_chat_template``; use what the student's prompt uses.

    Raises:
        ValueError: The question and the answer alone exceed ``max_length``, ``max_length`` is not positive,
            or the last message is not a user message.
        TypeError: The last message's content is not a string.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: expected a positive number of tokens or None, got {max_length}")
    given = {"answer": answer, "demonstration": demonstration, "feedback": feedback}
    context = Context(tuple((kind, content) for kind, content in given.items() if content is not None))
    more: Any = {"max_length": max_length, "chat_template_kwargs": chat_template_kwargs}
    return render_context(tokenizer, prompt, context, template, **more)


def render_context(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    context: Context,
    template: ContextTemplate,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PrivilegedContext:
    """The teacher's prompt of a `Context`: in the template's own words for an answer, a demonstration and a feedback
    alone, else part by part.

    Raises ValueError as `build_context` does, and for a kind that ``template.parts`` has no wording for.
    """
    question = prompt if context.question is None else context.question
    shown = {kind: content for kind, content in context.parts if says_something(tokenizer, content)}
    has_own_words = shown.keys() <= OWN_WORDS
    if not has_own_words and (unknown := sorted(shown.keys() - template.parts.keys())):
        raise ValueError(f"parts: expected kinds among {sorted(template.parts)}, got {unknown}")
    order = context.cut
    if order is None and has_own_words:  # the feedback is said where the demonstration does not fit
        order = ("demonstration", "feedback")
    elif order is None:
        order = tuple(kind for kind in reversed(shown) if kind != "answer")
    made = _fitted(tokenizer, question, shown, template, order, max_length, chat_template_kwargs)
    return replace(made, kind="other") if context.question is not None and made.kind == "nothing" else made


def _fitted(
    tokenizer: Any,
    question: Prompt,
    shown: Mapping[str, Content],
    template: ContextTemplate,
    order: Sequence[str],
    max_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> PrivilegedContext:
    """The prompt with what is shown, by kind; kinds are cut, then left out, in this order until it fits."""
    limit = float("inf") if max_length is None else max_length
    texts = {kind: c if isinstance(c, str) else _decode(tokenizer, c) for kind, c in shown.items()}
    has_own_words, cut = shown.keys() <= OWN_WORDS, False

    def prompt_ids(**changed: str) -> tuple[int, ...]:
        words = _own_words if has_own_words else _words_of_parts
        said = words(template, texts | changed, last_user_text(question))
        asked = extended(question, said) if said else question
        return tokenize_prompt(tokenizer, asked, chat_template_kwargs=chat_template_kwargs)

    ids = prompt_ids()
    for kind in order:
        if len(ids) <= limit:
            break
        if kind in texts:
            cut = True
            fitted = _fit(tokenizer, shown[kind], lambda text, kind=kind: prompt_ids(**{kind: text}), limit)
            if fitted is None:
                del texts[kind]
            ids = fitted or prompt_ids()
    if len(ids) > limit:
        raise ValueError(
            f"max_length: expected at least {len(ids)} tokens, which the question and what must not be cut take, "
            f"got {max_length}"
        )
    if "demonstration" in texts:
        kind = "peer"
    elif has_own_words and texts:
        kind = "answer_only" if "answer" in texts else "feedback"
    else:
        kind = "other" if texts else "nothing"
    return PrivilegedContext(ids, kind, truncated=cut)


def _own_words(template: ContextTemplate, texts: Mapping[str, str], question: str) -> str:
    """Of an answer, a demonstration and a feedback, which stands where there is neither of the others."""
    if "demonstration" in texts:
        wording = template.with_peer if "answer" in texts else template.demonstration_only
    elif "answer" in texts:
        wording = template.answer_only
    else:
        wording = template.feedback_only if texts else ""
    return wording.format(question=question, **texts)


def _words_of_parts(template: ContextTemplate, texts: Mapping[str, str], question: str) -> str:
    said = "".join(template.parts[kind].format(text=text, question=question) for kind, text in texts.items())
    return said + template.closing.format(question=question) if said else ""


def says_something(tokenizer: Any, content: Content) -> bool:
    return bool((content if isinstance(content, str) else _decode(tokenizer, content)).strip())


THINKING = (("<think>", "</think>"), ("<|channel|>analysis", "<|channel|>final<|message|>"))


def without_thinking(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Sequence[int]:
    """The tokens after a rollout's thinking: ``<think> .. </think>``, or gpt-oss's channels. Those of a rollout without
    either as they are; none where the thinking does not end."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    for begin, end in THINKING:
        if end in text:
            return tokenizer(text=text.rpartition(end)[2].lstrip(), add_special_tokens=False)["input_ids"]
        if begin in text:
            return ()
    return ids


def _fit(
    tokenizer: Any, shown: Content, prompt_with: Callable[[str], tuple[int, ...]], limit: float
) -> tuple[int, ...] | None:
    """The prompt with as much of the beginning of ``shown`` as fits; None where nothing of it does."""
    tokens = tokenizer(text=shown, add_special_tokens=False)["input_ids"] if isinstance(shown, str) else shown
    kept = total = len(tokens)
    while kept > 0:
        text = shown if isinstance(shown, str) and kept == total else _decode(tokenizer, tokens[:kept])
        assert isinstance(text, str)
        if kept < total:
            text = text.rstrip("\ufffd")  # a character whose last bytes were cut off
        if not text.strip():
            break
        ids = prompt_with(text)
        if len(ids) <= limit:
            return ids
        # Decoded text can tokenize into other tokens than it came from, so this may take a few rounds.
        kept -= len(ids) - int(limit)
    return None


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids of a prompt, special tokens as TRL's ``GRPOTrainer`` puts them into the student's prompt.

    A string goes through ``tokenizer(text=prompt)``, which adds the tokenizer's own special tokens; messages
    go through the chat template with the generation prompt. Raises ValueError for text outside the vocabulary.
    """
    ids: Any
    with known_words(prompt):
        if isinstance(prompt, str):
            ids = tokenizer(text=prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **(chat_template_kwargs or {}),
            )
    return tuple(ids)


@contextmanager
def known_words(prompts: Any) -> Iterator[None]:
    """Raises ValueError with ``prompts``, which are tokenized inside, for text outside a small vocabulary."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no class of its own
            raise
        raise ValueError(f"prompt: expected text that the tokenizer knows, got {prompts!r:.200} ({error})") from error


def check_alignment(
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    rollout_ids: Sequence[int],
) -> None:
    """Check that both sequences end with exactly the rollout's token ids.

    Otherwise teacher and student would be compared at different tokens.

    Raises:
        ValueError: Names the side, the first position in the rollout that differs, and both tokens.
    """
    for side, ids in (("student_ids", student_ids), ("teacher_ids", teacher_ids)):
        start = len(ids) - len(rollout_ids)
        if start < 0:
            raise ValueError(
                f"{side}: expected to end with the {len(rollout_ids)} rollout tokens, got {len(ids)} tokens"
            )
        for t, expected in enumerate(rollout_ids):
            if ids[start + t] != expected:
                raise ValueError(
                    f"{side}: expected to end with the rollout's tokens, but rollout position {t} holds "
                    f"{ids[start + t]}, not {expected}"
                )


def extended(prompt: Prompt, words: str) -> Prompt:
    """``prompt`` with ``words`` at the end of its text, or of its last message, which must be the user's."""
    if isinstance(prompt, str):
        return prompt + words
    last = prompt[-1] if prompt else {}
    role, content = last.get("role"), last.get("content")
    if role != "user":
        raise ValueError(f"prompt: expected the last message to be a user message, got role {role!r}")
    if not isinstance(content, str):
        raise TypeError(f"prompt: expected string content in the last message, got {type(content).__name__}")
    return [*prompt[:-1], {**last, "content": content + words}]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # Without the clean-up the text keeps its own spacing, so that its tokens come back as they were.
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
