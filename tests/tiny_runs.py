"""What the tests of training runs share: a tiny Qwen3, a verifier that it passes about half the time, settings."""

import copy

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from hsd.hindsight.context import ContextTemplate
from hsd.hindsight.groups import Group, Rollout
from hsd.tasks import small_world
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer

TOKENIZER = small_world.build_tokenizer()
TEMPLATE = ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY)
QUESTIONS = small_world.make_questions(6, seed=0)
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}
SMALLER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
QUIET = {  # fp32 on a CPU, nothing shown and nothing kept
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
STEP = QUIET | {  # one step of SGD at learning rate 1, which moves the weights by minus the gradient
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 9,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
}
OF_TRAINER = ("peft_config", "feedback_fn", "writer_fn", "eval_dataset", "environment_factory", "rollout_func")
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def qwen3(seed=1, **options):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 8, "tie_word_embeddings": True} | options)).float()


def with_lora(model):
    """peft writes into the configuration that it is given."""
    return get_peft_model(model, copy.deepcopy(LORA))


def start_adapters(model, std=0.05):
    """LoRA's B starts at 0, where adapters on and off agree. Without LoRA nothing happens."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=std, generator=generator)


def group(prompt, answer, **rollouts):
    """A group of the small world's texts and their rewards."""
    return Group(prompt, answer, tuple(Rollout(tuple(TOKENIZER(t)["input_ids"]), r) for t, r in rollouts.items()))


def half(completion_ids, **kwargs):
    """The parity of the first two tokens."""
    return [float(sum(ids[:2]) % 2) for ids in completion_ids]


class Recorder(HSDTrainer):
    """Keeps the generated batches."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.batches = [*getattr(self, "batches", []), batch]
        return batch


def make(model, folder, cls=Recorder, reward=half, questions=QUESTIONS, template=TEMPLATE, **options):
    """A trainer of one `STEP`; ``options`` are those of `HSDConfig` and those `OF_TRAINER`."""
    of_trainer = {name: options.pop(name) for name in OF_TRAINER if name in options}
    return cls(
        model=model,
        reward_funcs=reward,
        args=HSDConfig(str(folder), **STEP | options),
        train_dataset=Dataset.from_list(questions),
        processing_class=TOKENIZER,
        context_template=template,
        **of_trainer,
    )
