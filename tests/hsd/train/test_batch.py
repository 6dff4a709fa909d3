"""What goes into TRL's dictionary comes out of it, also after TRL has split it."""

import torch
from trl.trainer.utils import split_tensor_dict

from hsd.hindsight.context import PrivilegedContext
from hsd.hindsight.teacher_prompts import TeacherPrompt
from hsd.train.batch import TeacherBatch, collate, unpack

CONTEXTS = (((5, 6), "peer", 1), ((7,), "answer_only", None), ((8, 9, 1), "nothing", None), ((4, 4), "peer", 0))


def trl_batch():
    prompts = [[TeacherPrompt(PrivilegedContext(ids, kind, truncated=False), tau)] for ids, kind, tau in CONTEXTS]
    success = torch.tensor([False, True, False, True])
    teacher = collate(prompts, torch.tensor(3.0), 0, TeacherBatch(success))
    return {
        "prompt_ids": torch.tensor([[1, 2]] * 4),
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": torch.arange(12).reshape(4, 3),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 0, 1]] * 4),
        "advantages": torch.arange(4.0),
        **teacher.pack(),
    }


def test_what_is_packed_is_unpacked():
    batch = unpack(trl_batch())
    teacher = batch.inputs.prompts["teacher"]
    assert teacher.ids.tolist() == [[0, 5, 6], [0, 0, 7], [8, 9, 1], [0, 4, 4]]
    assert teacher.mask.tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert batch.teacher.divergence_position.tolist() == [1, -1, -1, 0]
    assert batch.loss_mask.tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 1]]  # without the tool's tokens
    assert batch.divergence_mask.tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]]
    assert batch.old_logps is None


def test_the_parts_of_a_split_batch_are_its_rows():
    whole = unpack(trl_batch())
    for start, part in zip((0, 2), split_tensor_dict(trl_batch(), 2), strict=True):
        got, rows = unpack(part), slice(start, start + 2)
        assert torch.equal(got.inputs.prompts["teacher"].ids, whole.inputs.prompts["teacher"].ids[rows])
        assert torch.equal(got.teacher.success, whole.teacher.success[rows])
        assert torch.equal(got.teacher.tokens_per_micro_batch, torch.tensor(3.0))


def test_weights_over_tokens_and_over_rollouts():
    batch = unpack(trl_batch())
    tokens, rollouts = batch.targets("token"), batch.targets("rollout")
    torch.testing.assert_close(tokens.divergence_weights, batch.divergence_mask / 3.0)
    torch.testing.assert_close(rollouts.divergence_weights.sum(-1), torch.tensor([0.25, 0.25, 0.0, 0.25]))
    torch.testing.assert_close(rollouts.policy_weights.sum(-1), torch.full((4,), 0.25))
