"""The two sides of a step of SFT, DPO and GRPO: this project, and trl's trainers.

Both load one checkpoint and one LoRA (r 8, query and value, B not zero), get the same batches of
text and train in fp32 with AdamW, the gradient norm clipped to 1.  Ours is
`minigpt.training.training_step`, theirs the `training_step` of a trainer.  A step of either gives
its loss and the gradient norm before clipping, which must agree.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_model import NAME, text
from benchmarks.sides import LR, our_step, shifted
from minigpt import load
from minigpt.data.text import IGNORED, Batch
from minigpt.data.tokenizer import Tokenizer
from minigpt.objectives.causal import language_model_loss
from minigpt.objectives.logprobs import completion_logprobs
from minigpt.objectives.pairs import Completions, Dpo, collate_completions, preference_loss
from minigpt.objectives.reference import Reference
from minigpt.objectives.reinforcement import REINFORCEMENTS, Options, Round
from minigpt.settings.methods import MethodOptions, attach
from minigpt.training.parallel import trained
from minigpt.training.rounds import Prompt, Rounds, Sampler
from minigpt.training.train import Loss
from peft_lite import Handle

BETA_DPO, BETA_GRPO = 0.1, 0.04
ROWS, LENGTH, LABELLED = 4, 128, 64
PROMPT, ANSWER = 32, 64
GROUP, NEW = 8, 32
DRAWN, UPDATE = "grpo", "grpo-update"  # each side draws its completions; all are given the same
GIVEN = 4  # rounds of completions that are given, in turn
END = "<|im_end|>"  # ends SmolLM2's answers

Step = Callable[[int], tuple[float, float]]  # number of a batch -> loss, gradient norm


def ids(i: int, count: int) -> list[int]:
    """`count` tokens of the text, others for each i."""
    start = i * count % (len(text()) - count)
    return text()[start : start + count].tolist()


def sft_batch(i: int) -> tuple[Tensor, Tensor]:
    """Ids and their own labels (4, 128), not shifted."""
    tokens = torch.tensor(ids(i, ROWS * LENGTH)).view(ROWS, LENGTH)
    labels = tokens.clone()
    labels[:, :-LABELLED] = IGNORED
    return tokens, labels


def pairs(i: int) -> list[Completions]:
    size = PROMPT + 2 * ANSWER
    rows = torch.tensor(ids(i, ROWS * size)).view(ROWS, size)
    return [
        Completions(*(part.tolist() for part in row.split([PROMPT, ANSWER, ANSWER])))
        for row in rows
    ]


def few_spaces(completions: list[str], **_: object) -> list[float]:
    """The rule: fewer spaces are better."""
    return [-text.count(" ") / 10 for text in completions]


@cache
def given_rounds(directory: Path) -> list[tuple[Tensor, Round]]:
    """Ids (8, 64) of a prompt and of eight completions, and what the completions got: scores, and
    log-probabilities (8, 32) by the model with its LoRA, which drew them, and without.
    """
    model, handle = adapted(directory)
    rounds = []
    for i in range(GIVEN):
        completions = torch.tensor(ids(i, GROUP * NEW)).view(GROUP, NEW)
        rows = torch.cat([torch.tensor([ids(i, PROMPT)] * GROUP), completions], 1)
        read = partial(completion_logprobs, model, rows, torch.ones_like(rows), completions)
        with torch.no_grad():
            policy = read()
            with handle.enabled(False):
                reference = read()
        scores = torch.arange(GROUP) ** 2 / 10
        rounds.append((rows, Round(scores, torch.ones(GROUP, NEW), policy, reference)))
    return rounds


# --- ours ---------------------------------------------------------------------------------------


def adapted(directory: Path) -> tuple[Any, Handle]:
    """A model with a LoRA whose B is not zero."""
    torch.manual_seed(0)
    model = load(directory, head="causal-lm")
    handle = attach(model, MethodOptions(method="lora"))
    assert handle is not None
    with torch.no_grad():
        for name, p in trained(model).items():
            if name.endswith("lora_b"):
                p.normal_(0, 0.01)
    return model, handle


def ours(directory: Path, what: str) -> Step:
    model, handle = adapted(directory)
    batches: Callable[[int], Batch]
    loss: Loss
    if what == "sft":
        batches, loss = our_sft_batch, language_model_loss
    elif what == "dpo":
        reference = Reference(model, "lora")
        batches = lambda i: collate_completions(pairs(i))  # noqa: E731
        loss = preference_loss(Dpo(BETA_DPO, reference, handle))
    else:
        objective = REINFORCEMENTS["grpo"]
        chosen = Options(beta=BETA_GRPO, kl="k3", generations=GROUP)
        if what == DRAWN:
            batches = our_rounds(model, handle, chosen)
        else:
            batches = partial(our_given_round, given_rounds(directory), chosen)
        loss = partial(objective.loss, options=chosen)

    run = our_step(model, loss, batches)

    def step(i: int) -> tuple[float, float]:
        row = run(i)
        return row["loss"], row["gradient_norm"]

    return step


def our_sft_batch(i: int) -> Batch:
    tokens, labels = sft_batch(i)
    return {"input_ids": tokens, "labels": shifted(labels)}


def our_rounds(model: Any, handle: Handle, chosen: Options) -> Rounds:
    tokenizer = Tokenizer.load(NAME)
    sampler = Sampler(
        policy=model,
        handle=handle,
        reference=Reference(model, "lora"),
        score=lambda prompts, texts: torch.tensor(few_spaces(list(texts))),
        text=lambda prompt, completion: tokenizer.decode(list(completion)),
        ends=(),  # all completions have one length
        max_new_tokens=NEW,
        rows=GROUP,
    )
    prompts = [Prompt(ids(i, PROMPT), "", {}) for i in range(16)]
    return Rounds(sampler, REINFORCEMENTS["grpo"], chosen, prompts, batch_size=GROUP)


def our_given_round(rounds: list[tuple[Tensor, Round]], chosen: Options, i: int) -> Batch:
    rows, round = rounds[i % GIVEN]
    labels = {"attention_mask": torch.ones_like(rows), "labels": rows[:, PROMPT:]}
    return {"input_ids": rows, **labels, **REINFORCEMENTS["grpo"].batch(round, chosen)}


# --- trl's --------------------------------------------------------------------------------------


def trainer(directory: Path, what: str, folder: str) -> Any:
    """trl's trainer of the same model with the same LoRA."""
    import peft
    import transformers
    import trl  # type: ignore[import-not-found]

    logging.disable(logging.WARNING)
    kind: Any = transformers.PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_object=Tokenizer.load(NAME).backend, eos_token=END, pad_token=END)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lora: Any = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
    )
    shared: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "learning_rate": LR,
        "max_grad_norm": 1.0,
    }
    rows = [{"prompt": tokenizer.decode(ids(i, PROMPT)), "completion": " a"} for i in range(16)]
    given: dict[str, Any] = {"model": model, "processing_class": tokenizer, "peft_config": lora}
    if what == "sft":
        settings = trl.SFTConfig(**shared, per_device_train_batch_size=ROWS)
        data = dataset(rows)
        made = trl.SFTTrainer(**given, args=settings, train_dataset=data)
    elif what == "dpo":
        settings = trl.DPOConfig(**shared, per_device_train_batch_size=ROWS, beta=BETA_DPO)
        data = dataset([{"prompt": r["prompt"], "chosen": " a", "rejected": " b"} for r in rows])
        made = trl.DPOTrainer(**given, args=settings, train_dataset=data)
    else:
        settings = trl.GRPOConfig(
            **shared,
            per_device_train_batch_size=GROUP,
            num_generations=GROUP,
            max_completion_length=NEW,
            beta=BETA_GRPO,
            generation_kwargs={"min_new_tokens": NEW},  # all completions have one length
        )
        data = dataset([{"prompt": r["prompt"]} for r in rows])
        made = trl.GRPOTrainer(**given, args=settings, train_dataset=data, reward_funcs=few_spaces)
    _, handle = adapted(directory)
    peft.set_peft_model_state_dict(made.model, handle.state())
    made.create_optimizer()
    made.current_gradient_accumulation_steps = 1
    return made


def dataset(rows: list[dict[str, str]]) -> Any:
    """Rows for a trainer; named, as datasets 5.2 cannot hash what pyarrow 26 made of them."""
    import datasets  # type: ignore[import-not-found]

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = datasets.table.InMemoryTable.from_pydict(columns)
    return datasets.Dataset(table, fingerprint="rows")


def theirs(directory: Path, what: str, folder: str, compiled: bool = False) -> Step:
    made = trainer(directory, what, folder)
    if compiled:
        made.model.base_model.model.model.compile()
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    inputs_of = partial(their_inputs, made, what)
    if what == UPDATE:
        made._prepare_inputs = lambda inputs: inputs  # draws nothing
        inputs_of = partial(their_given_round, given_rounds(directory))

    def step(i: int) -> tuple[float, float]:
        inputs, count = inputs_of(i)
        loss = made.training_step(made.model, inputs, count)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        made.optimizer.step()
        made.optimizer.zero_grad()
        return float(loss), float(norm)

    return step


def their_inputs(made: Any, what: str, i: int) -> tuple[Any, Tensor | None]:
    """What their loader would give for the same batch, and the number of its labels."""
    if what == "sft":
        tokens, labels = sft_batch(i)
        mask = torch.ones_like(tokens)
        inputs = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
        return inputs, (labels[:, 1:] != IGNORED).sum()
    if what == "dpo":
        batch = collate_completions(pairs(i))
        order = torch.arange(2 * ROWS).view(ROWS, 2).T.flatten()  # all chosen, then all rejected
        counted = torch.cat([torch.zeros(2 * ROWS, PROMPT), torch.ones(2 * ROWS, ANSWER)], 1)
        return {
            "input_ids": batch["input_ids"][order],
            "attention_mask": batch["attention_mask"][order],
            "completion_mask": counted.long(),
        }, None
    row = made.train_dataset[i % len(made.train_dataset)]
    return [row] * GROUP, None


def their_given_round(rounds: list[tuple[Tensor, Round]], i: int) -> tuple[Any, Tensor | None]:
    """What they keep of a round, with advantages by their formula."""
    rows, round = rounds[i % GIVEN]
    scores = round.scores
    return {
        "prompt_ids": rows[:, :PROMPT],
        "prompt_mask": torch.ones(GROUP, PROMPT, dtype=torch.long),
        "completion_ids": rows[:, PROMPT:],
        "completion_mask": torch.ones(GROUP, NEW, dtype=torch.long),
        "advantages": (scores - scores.mean()) / (scores.std() + 1e-4),
        "old_per_token_logps": round.logprobs,
        "ref_per_token_logps": round.reference,
        "num_items_in_batch": torch.tensor(GROUP * NEW),
    }, None
