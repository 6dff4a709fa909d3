from hsd.tasks import chain_sum, registered
from hsd.train.config import HSDConfig


def test_questions_differ_and_none_is_held_out_or_a_worked_example():
    task = registered("chain_sum", 0)
    asked = [q["prompt"][-1]["content"] for q in [*task.held_out, *task.questions]]
    assert len(task.held_out) == chain_sum.HELD_OUT and len(asked) > 700
    shown = [turn["content"] for turn in task.questions[0]["prompt"][:-1]]
    assert len({*asked, *shown[::2]}) == len(asked) + 3
    assert {text.partition(":")[0] for text in asked} == {shown[0].partition(":")[0]}
    assert chain_sum.questions(0) == chain_sum.questions(0) != chain_sum.questions(1)


def test_worked_examples_are_right():
    for chain, steps in chain_sum.WORKED:
        *lines, answer = steps.splitlines()
        assert all(eval(a) == int(b) for a, b in (line.split(" = ") for line in lines))
        assert answer == f"Answer: {eval(chain)}"


def test_reward_and_settings(tmp_path):
    task = registered("chain_sum", 0)
    HSDConfig(str(tmp_path), **task.config)
    asked = task.questions[0]
    replies = [f"Answer: {asked['answer']}", "Answer: many", ""]
    columns = {key: [asked[key]] * 3 for key in ("generator", "id", "answer")}
    assert task.reward(completions=replies, **columns) == [1.0, 0.0, 0.0]
