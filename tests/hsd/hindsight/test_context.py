"""Teacher prompts, with a byte-level tokenizer built here: a token a byte, a few merges and specials."""

import copy
import re
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from hsd.hindsight.context import (
    DEFAULT_CHAT_TEMPLATE,
    DEFAULT_TEXT_TEMPLATE,
    Context,
    ContextTemplate,
    build_context,
    check_alignment,
    known_words,
    render_context,
    tokenize_prompt,
    without_thinking,
)
from hsd.hindsight.groups import Prompt
from hsd.tasks import small_world

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
SHORT = ContextTemplate(with_peer=" [{answer}|{demonstration}]", answer_only=" [{answer}]")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
TEXT = "What is 3 + 4?"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "at", "==", "===="])}
    merges = [("a", "t"), ("=", "="), ("==", "==")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    built = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    built.chat_template = CHAT_TEMPLATE
    return built


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def text_of(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def shared_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_text_prompt_with_and_without_peer(tokenizer: PreTrainedTokenizerFast):
    demonstration = [*ids_of(tokenizer, "3 + 4 is 7."), tokenizer.eos_token_id]
    with_peer = build_context(tokenizer, TEXT, "7", demonstration, SHORT)
    assert text_of(tokenizer, with_peer.prompt_ids) == "<s>What is 3 + 4? [7|3 + 4 is 7.]"
    assert with_peer.kind == "peer" and not with_peer.truncated

    alone = build_context(tokenizer, TEXT, "7", None, SHORT)
    assert text_of(tokenizer, alone.prompt_ids) == "<s>What is 3 + 4? [7]"
    assert (alone.kind, alone.truncated) == ("answer_only", False)


def test_text_prompt_gets_the_special_tokens_of_the_students_prompt(tokenizer: PreTrainedTokenizerFast):
    student = tokenizer(text=[TEXT])["input_ids"][0]  # as GRPOTrainer._tokenize_prompts calls it
    assert list(tokenize_prompt(tokenizer, TEXT)) == student
    teacher = build_context(tokenizer, TEXT, "7", None, SHORT).prompt_ids
    assert list(teacher[: len(student)]) == student
    assert teacher.count(tokenizer.bos_token_id) == 1


def test_text_outside_a_small_vocabulary_is_named():
    with pytest.raises(ValueError, match=r"^prompt: expected text that the tokenizer knows, got 'What is 1\+1\?'"):
        tokenize_prompt(small_world.build_tokenizer(), "What is 1+1?")
    with pytest.raises(ValueError, match=r"^prompt: expected text that the tokenizer knows, got \[\{'role'"):
        tokenizer = small_world.build_tokenizer()
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        tokenize_prompt(tokenizer, [{"role": "user", "content": "What is 1+1?"}])


def test_another_error_than_that_of_a_vocabulary_stays_itself():
    with pytest.raises(KeyError, match="x"), known_words("1+1="):
        raise KeyError("x")


def test_chat_prompt_goes_into_the_last_user_message(tokenizer: PreTrainedTokenizerFast):
    before = copy.deepcopy(CHAT)
    context = build_context(tokenizer, CHAT, "7", ids_of(tokenizer, "It is 7."), SHORT)
    assert CHAT == before
    assert text_of(tokenizer, context.prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 3 + 4? [7|It is 7.]<|im_end|>\n<|im_start|>assistant\n"
    )
    student = tokenize_prompt(tokenizer, CHAT)
    question_end = len(ids_of(tokenizer, text_of(tokenizer, student).split("?")[0] + "?"))
    assert shared_prefix(student, context.prompt_ids) == question_end


def test_chat_template_kwargs_reach_the_template(tokenizer: PreTrainedTokenizerFast):
    for kwargs, suffix in ((None, "assistant\n"), ({"enable_thinking": False}, "assistant\n<think></think>")):
        context = build_context(tokenizer, CHAT, "7", None, SHORT, chat_template_kwargs=kwargs)
        assert text_of(tokenizer, context.prompt_ids).endswith(suffix)


@pytest.mark.parametrize("prompt", [TEXT, CHAT], ids=["text", "chat"])
def test_braces_are_plain_characters(tokenizer: PreTrainedTokenizerFast, prompt: Prompt):
    answer, demonstration = r"\frac{1}{2}{}", "so {answer} {0} }{ {demonstration}"
    context = build_context(tokenizer, prompt, answer, ids_of(tokenizer, demonstration), SHORT)
    assert f" [{answer}|{demonstration}]" in text_of(tokenizer, context.prompt_ids)


@pytest.mark.parametrize("prompt", [TEXT, CHAT], ids=["text", "chat"])
def test_a_long_demonstration_loses_its_tail(tokenizer: PreTrainedTokenizerFast, prompt: Prompt):
    demonstration = "".join(chr(ord("a") + i % 23) for i in range(300))
    ids = ids_of(tokenizer, demonstration)
    full = build_context(tokenizer, prompt, "ANSWER", ids, SHORT)
    assert not full.truncated
    exact = build_context(tokenizer, prompt, "ANSWER", ids, SHORT, max_length=len(full.prompt_ids))
    assert exact == full

    cut = build_context(tokenizer, prompt, "ANSWER", ids, SHORT, max_length=len(full.prompt_ids) - 100)
    assert cut.truncated and cut.kind == "peer"
    assert len(cut.prompt_ids) == len(full.prompt_ids) - 100
    text = text_of(tokenizer, cut.prompt_ids)
    assert f"What is 3 + 4? [ANSWER|{demonstration[:200]}]" in text


def test_cutting_when_decoded_text_tokenizes_differently(tokenizer: PreTrainedTokenizerFast):
    equals = ids_of(tokenizer, "=")[0]
    ids = [equals] * 400  # sampled one by one; the text comes back as 100 tokens of four
    for max_length in range(30, 60):
        context = build_context(tokenizer, TEXT, "7", ids, SHORT, max_length=max_length)
        assert context.truncated and context.kind == "peer"
        assert len(context.prompt_ids) <= max_length
        shown = re.fullmatch(r"<s>What is 3 \+ 4\? \[7\|(=+)\]", text_of(tokenizer, context.prompt_ids))
        assert shown


def test_a_cut_never_shows_half_a_character(tokenizer: PreTrainedTokenizerFast):
    ids = ids_of(tokenizer, "é" * 40)  # two bytes, two tokens each
    full = build_context(tokenizer, TEXT, "7", ids, SHORT)
    for cut in (9, 10):
        context = build_context(tokenizer, TEXT, "7", ids, SHORT, max_length=len(full.prompt_ids) - cut)
        assert text_of(tokenizer, context.prompt_ids).endswith("|" + "é" * 35 + "]")


def test_no_room_for_the_demonstration_or_for_anything(tokenizer: PreTrainedTokenizerFast):
    ids = ids_of(tokenizer, "x" * 30)
    alone = build_context(tokenizer, TEXT, "7", None, SHORT)
    needed = len(alone.prompt_ids)
    fallback = build_context(tokenizer, TEXT, "7", ids, SHORT, max_length=needed)
    assert fallback.prompt_ids == alone.prompt_ids
    assert (fallback.kind, fallback.truncated) == ("answer_only", True)
    for demonstration in (ids, None):
        with pytest.raises(ValueError, match=rf"^max_length: .*at least {needed} tokens.*got {needed - 1}$"):
            build_context(tokenizer, TEXT, "7", demonstration, SHORT, max_length=needed - 1)
    with pytest.raises(ValueError, match=r"^max_length: .*positive"):
        build_context(tokenizer, TEXT, "7", ids, SHORT, max_length=0)


@pytest.mark.parametrize("text", ["", " \n", "<|im_end|>"])
def test_a_blank_demonstration_is_none(tokenizer: PreTrainedTokenizerFast, text: str):
    expected = build_context(tokenizer, TEXT, "7", None, SHORT)
    assert build_context(tokenizer, TEXT, "7", ids_of(tokenizer, text), SHORT) == expected
    without = build_context(tokenizer, TEXT, None, None, SHORT, feedback="no")
    assert without.kind == "feedback"
    assert build_context(tokenizer, TEXT, None, ids_of(tokenizer, text), SHORT, feedback="no") == without


def test_chat_prompt_must_end_with_a_users_text(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ValueError, match=r"^prompt: .*user message, got role 'assistant'"):
        build_context(tokenizer, [*CHAT, {"role": "assistant", "content": "7"}], "7", None, SHORT)
    with pytest.raises(ValueError, match=r"^prompt: .*got role None"):
        build_context(tokenizer, [], "7", None, SHORT)
    with pytest.raises(TypeError, match=r"^prompt: expected string content .*got list"):
        build_context(tokenizer, [{"role": "user", "content": [{"type": "text"}]}], "7", None, SHORT)


@pytest.mark.parametrize(
    ("with_peer", "answer_only", "name"),
    [
        ("{demonstration}", "{answer}", "with_peer"),
        ("{answer}", "{answer}", "with_peer"),
        ("{answer} {demonstration} {questions}", "{answer}", "with_peer"),
        ("{answer} {demonstration} {}", "{answer}", "with_peer"),
        ("{answer!r} {demonstration}", "{answer}", "with_peer"),
        ("{answer.__class__} {demonstration}", "{answer}", "with_peer"),
        ("{answer} {demonstration", "{answer}", "with_peer"),
        ("{answer} {demonstration}", "no field", "answer_only"),
        ("{answer} {demonstration}", "{answer} {demonstration}", "answer_only"),
    ],
)
def test_template_errors(with_peer: str, answer_only: str, name: str):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        ContextTemplate(with_peer, answer_only)


def test_template_may_hold_escaped_braces(tokenizer: PreTrainedTokenizerFast):
    template = ContextTemplate("{{x}} {answer} {demonstration}", r" \boxed{{{answer}}}")
    context = build_context(tokenizer, TEXT, "7", None, template)
    assert text_of(tokenizer, context.prompt_ids).endswith(r" \boxed{7}")


@pytest.mark.parametrize(
    ("prompt", "template"),
    [(TEXT, DEFAULT_TEXT_TEMPLATE), (CHAT, DEFAULT_CHAT_TEMPLATE)],
    ids=["text", "chat"],
)
def test_default_templates(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, template: ContextTemplate):
    demonstration = "Three and four\nmake seven."
    context = build_context(tokenizer, prompt, "7", ids_of(tokenizer, demonstration), template)
    text = text_of(tokenizer, context.prompt_ids)
    order = [
        "What is 3 + 4?",
        "reference answer",
        "correct solution to the same problem",
        "Reference answer: 7\n",
    ]
    order += [demonstration, "in your own words"]
    places = [text.index(piece) for piece in order]
    assert places == sorted(places)
    alone = text_of(tokenizer, build_context(tokenizer, prompt, "7", None, template).prompt_ids)
    assert "Reference answer: 7\n" in alone and "in your own words" in alone
    assert "correct solution" not in alone.lower()


def test_check_alignment():
    check_alignment([1, 5, 6], [1, 2, 3, 5, 6], [5, 6])
    with pytest.raises(ValueError, match=r"^student_ids: .*position 1 holds 7, not 6"):
        check_alignment([1, 5, 7], [1, 5, 6], [5, 6])
    with pytest.raises(ValueError, match=r"^teacher_ids: .*position 0 holds 4, not 5"):
        check_alignment([1, 5, 6], [1, 4, 6], [5, 6])
    with pytest.raises(ValueError, match=r"^teacher_ids: .*position 0 holds 6, not 5"):
        check_alignment([1, 5, 6], [1, 5, 6, 9], [5, 6])
    with pytest.raises(ValueError, match=r"^teacher_ids: expected .* 2 rollout tokens, got 1 tokens"):
        check_alignment([1, 5, 6], [6], [5, 6])


# -- contexts of parts -------------------------------------------------------------------------------------------------

PARTS = {"answer": " [{text}", "demonstration": "|{text}", "failure": "!{text}", "verdict": "?{text}"}
OF_PARTS = ContextTemplate(" [{answer}|{demonstration}]", " [{answer}]", parts=PARTS, closing="]")


def rendered(tokenizer, context, prompt=TEXT, **options):
    return render_context(tokenizer, prompt, context, OF_PARTS, **options)


def test_parts_follow_each_other_in_order_and_empty_ones_vanish(tokenizer):
    failed = ids_of(tokenizer, "4 + 4")
    parts = (("verdict", "no"), ("failure", failed), ("demonstration", "  "), ("answer", "7"))
    made = rendered(tokenizer, Context(parts))
    assert text_of(tokenizer, made.prompt_ids) == "<s>" + TEXT + "?no!4 + 4 [7]"
    assert (made.kind, made.truncated) == ("other", False)
    chat = rendered(tokenizer, Context(parts), CHAT)
    assert "What is 3 + 4??no!4 + 4 [7]<|im_end|>" in text_of(tokenizer, chat.prompt_ids)
    braces = rendered(tokenizer, Context((("verdict", "{x} {"), ("answer", "}"))))
    assert text_of(tokenizer, braces.prompt_ids).endswith("?{x} { [}]")


def test_answer_demonstration_and_feedback_have_the_templates_own_words(tokenizer):
    for parts in ({"answer": "7"}, {"answer": "7", "demonstration": "3 + 4 = 7"}, {"demonstration": "x"}, {}):
        made = rendered(tokenizer, Context(tuple(parts.items())))
        given = {"answer": None, "demonstration": None} | parts
        assert made == build_context(tokenizer, TEXT, **given, template=OF_PARTS)


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (None, "?ok|ab"),
        (("verdict",), "|abcdef"),
        (("verdict", "demonstration"), "|abcdef"),
        (("demonstration",), "?ok|ab"),
    ],
)
def test_parts_are_cut_in_the_order_that_is_declared(cut, expected, tokenizer):
    parts = (("verdict", "ok"), ("demonstration", "abcdef"))
    whole = rendered(tokenizer, Context((*parts, ("answer", "7"))))
    limit = len(whole.prompt_ids) - (4 if expected.startswith("?") else 3)
    made = rendered(tokenizer, Context((*parts, ("answer", "7")), cut=cut), max_length=limit)
    said = text_of(tokenizer, made.prompt_ids).removeprefix("<s>" + TEXT)
    assert made.truncated and len(made.prompt_ids) <= limit
    if cut and cut[0] == "verdict":
        assert said == "|abcdef [7]"  # a verdict of which nothing fits is left out, with its words; then the template's
    else:
        assert said == expected + " [7]"


def test_what_must_not_be_cut_is_named(tokenizer):
    context = Context((("verdict", "ok"), ("answer", "7")), cut=())
    with pytest.raises(ValueError, match=r"^max_length: expected at least \d+ tokens, .* not be cut take, got 5"):
        rendered(tokenizer, context, max_length=5)
    with pytest.raises(ValueError, match=r"^parts: expected kinds among .*, got \['poem'\]"):
        rendered(tokenizer, Context((("poem", "x"),)))
    with pytest.raises(ValueError, match=r"^parts\['a'\]: expected exactly the fields"):
        ContextTemplate(" [{answer}|{demonstration}]", " [{answer}]", parts={"a": "{answer}"})


@pytest.mark.parametrize("parts", [(("demonstration", "abcdef"),), (("demonstration", "abcdef"), ("verdict", "ok"))])
def test_what_must_not_be_cut_is_the_contexts_to_say_in_any_words(parts, tokenizer):
    """Also where the template has words of its own for all that is shown."""
    limit = len(rendered(tokenizer, Context(parts)).prompt_ids) - 1
    assert rendered(tokenizer, Context(parts, cut=("demonstration",)), max_length=limit).truncated
    with pytest.raises(ValueError, match=r"^max_length: expected at least"):
        rendered(tokenizer, Context(parts, cut=()), max_length=limit)


def test_a_blank_answer_is_not_shown(tokenizer):
    for answer in (None, "", " "):
        assert build_context(tokenizer, TEXT, answer, None, SHORT).kind == "nothing"
        assert build_context(tokenizer, TEXT, answer, "d", SHORT).prompt_ids == tokenize_prompt(
            tokenizer, TEXT + SHORT.demonstration_only.format(demonstration="d")
        )


def test_another_question_replaces_the_students(tokenizer):
    made = rendered(tokenizer, Context(question="3 plus 4?"))
    assert (text_of(tokenizer, made.prompt_ids), made.kind) == ("<s>3 plus 4?", "other")
    both = rendered(tokenizer, Context((("verdict", "ok"),), question=CHAT))
    assert "What is 3 + 4??ok]<|im_end|>" in text_of(tokenizer, both.prompt_ids) and both.kind == "other"
    assert rendered(tokenizer, Context()).kind == "nothing"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>so</think> 7", "7"),
        ("so\n</think>\n\n7<|im_end|>", "7<|im_end|>"),
        ("<think>so", ""),
        ("<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>7", "7"),
        ("<|channel|>analysis<|message|>so", ""),
        ("a < b, think > 7", "a < b, think > 7"),
    ],
)
def test_a_rollout_without_its_thinking(text, left, tokenizer):
    ids = ids_of(tokenizer, text)
    found = without_thinking(tokenizer, ids)
    assert tokenizer.decode(list(found)) == left
    if text == left:
        assert found is ids  # bit by bit


def test_a_template_may_ask_the_question_again(tokenizer):
    again = "{answer} {demonstration} {question}"
    template = ContextTemplate(again, "{answer} {question}", "{demonstration} {question}", "{feedback} {question}")
    template = replace(template, parts={"hint": "{text} {question}"}, closing=" {question}!")
    for prompt in ("a b", [{"role": "system", "content": "x"}, {"role": "user", "content": "a b"}]):

        def said(*shown, prompt=prompt, **more):
            ids = build_context(tokenizer, prompt, *shown, template, **more).prompt_ids
            return tokenizer.decode(ids, skip_special_tokens=True)

        assert "7 d a b" in said("7", "d")
        assert "7 a b" in said("7", None)
        assert "d a b" in said(None, "d")
        assert "f a b" in said(None, None, feedback="f")
        shown = render_context(tokenizer, prompt, Context((("hint", "h"),)), template)
        assert "h a b a b!" in tokenizer.decode(shown.prompt_ids, skip_special_tokens=True)
    with pytest.raises(ValueError, match=r"^closing: expected exactly the fields \[\], and question if wanted"):
        replace(template, closing="{answer}")
