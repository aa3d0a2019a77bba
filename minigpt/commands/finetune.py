"""`minigpt finetune`: a pretrained model, a lesson, a method -> an adapter, metrics, a sample.

    minigpt finetune --model bundled --text bundled-carroll --out runs/text
    minigpt finetune --model bundled --chat bundled-answers --chat-template plain --out runs/chat

From a text, a decoder learns to predict the next token, an encoder masked ones (`--objective`,
minigpt/objectives); from conversations, a decoder learns to answer.  What differs between the two
is in minigpt/commands/lessons.py.  Where torchrun starts several processes, all run this together
(minigpt/training/processes.py).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import FORMS, find
from minigpt.commands.command import Run
from minigpt.commands.lessons import Lesson, LessonOptions, read_lesson
from minigpt.commands.tuning import costs
from minigpt.data.text import IGNORED
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.architecture import Model
from minigpt.objectives.registry import OBJECTIVES
from minigpt.plan.plan import Step, beside
from minigpt.plan.trace import spec
from minigpt.settings import runs
from minigpt.settings.manifest import model_files
from minigpt.settings.options import option
from minigpt.training import memory, parallel
from minigpt.training.processes import group
from minigpt.training.progress import progress_bar, say
from minigpt.training.trackers.follow import tracked
from minigpt.training.train import Row, evaluate, train
from peft_lite import report, storage
from peft_lite.quantized import CODECS, is_quantized


@dataclass(frozen=True, kw_only=True)
class Finetune(LessonOptions):
    """The command's settings."""

    model: str = option(f"a model: {FORMS}")
    quantize: str | None = option("hold the linear layers but the head in 4 bits", None, CODECS)
    parallel: str = option(
        "what processes of torchrun share: ddp: the work; fsdp: the model, too",
        "none",
        parallel.WAYS,
        free=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.parallel != "none":
            raise ValueError(f"--compile and --parallel {self.parallel} do not go together")


def finetune(settings: Finetune, out: Path, resume: bool) -> dict[str, object]:
    """Trains and writes to OUT `model/` (full, freeze) or `adapter/` (all others), `metrics.jsonl`,
    `sample.txt`, of conversations `heldout.jsonl`, and `summary.json`; returns the summary.
    """
    parallel.check(settings.parallel)
    processes = group()
    device = settings.find_device()
    before_model = memory.resident()
    settings = settings.dated()
    config = settings.with_rate()
    lesson_of = read_lesson(settings)
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    objective = OBJECTIVES[settings.objective]
    sharded = settings.parallel == "fsdp" and processes.size > 1
    place = "cpu" if sharded else device  # slices alone go to the device
    model = load(directory, objective.head, device=place, quantize=settings.quantize)
    tokenizer.check(model.config.vocab_size)
    if any(map(is_quantized, model.modules())):  # then memory counts more than time
        memory.map_large_blocks()
    lesson = lesson_of(directory, tokenizer)
    torch.manual_seed(settings.seed)
    handle = settings.attach(model)
    lesson.check(model)
    if processes.first:
        runs.claim(out, "finetune", settings, {**lesson.inputs, **model_files(directory)})

    counts, heldout = report(model), lesson.heldout
    spread = parallel.spread(model, settings.parallel, device, settings.bf16)
    before = evaluate(model, objective.loss, heldout, settings.bf16, spread)
    with torch.no_grad():
        sample_before = spread.run(lesson.sample)
    with (
        progress_bar(settings.method, settings.steps, settings.tokens_a_step) as show,
        tracked(settings.track if processes.first else [], out, asdict(settings), show) as observe,
    ):
        rows = train(
            *(model, objective.loss, lesson.batches, config, out, heldout, resume, observe),
            parallel=spread,
        )
    after = evaluate(model, objective.loss, heldout, settings.bf16, spread)
    with torch.no_grad():
        sample_after = spread.run(lesson.sample)
    spread.gather()
    if not processes.first:
        return {}

    result = settings.write(model, handle, tokenizer, directory, out)
    for name, text in lesson.files.items():
        storage.write_text(result / name, text)
    if lesson.rows:
        lines = [json.dumps({"messages": row}, ensure_ascii=False) for row in lesson.rows]
        storage.write_text(out / "heldout.jsonl", "".join(f"{line}\n" for line in lines))
    storage.write_text(
        out / "sample.txt",
        f"--- before ---\n{sample_before}\n\n--- after ---\n{sample_after}\n",
    )
    summary: dict[str, object] = {
        "method": settings.method,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        **({"processes": processes.size} if processes.size > 1 else {}),
        **lesson.counts,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        **costs(rows, before_model, result),
        **prediction(settings, model, lesson, device, before_model, rows),
        "config": asdict(config),
    }
    runs.complete(out, summary)
    return summary


def prediction(
    settings: Finetune,
    model: Model,
    lesson: Lesson,
    device: torch.device,
    before_model: int,
    rows: Sequence[Row],
) -> dict[str, object]:
    """What a plan says of the run's peak memory and of its steps, beside what was measured; of one
    process, uncompiled.  What it cannot trace costs the run nothing but these two numbers.
    """
    if group().size > 1 or settings.compile:
        return {}
    step, checkpointed = step_of(settings, lesson), settings.checkpoint_activations
    try:
        return beside(model, step, checkpointed, device, before_model, calibration(rows))
    except Exception as error:  # whatever it is, the run is done
        say(f"the plan cannot follow this step: {error}")
        return {}


def step_of(settings: Finetune, lesson: Lesson) -> Step:
    """What a plan has to know of a run's steps; its batches are like the first."""
    batch = lesson.batches(0)
    return Step(
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        objective=settings.objective,
        accumulate=settings.accumulate,
        bf16=settings.bf16,
        paged=settings.paged,
        given={name: spec(t) for name, t in batch.items()},
        labels=int((batch["labels"] != IGNORED).sum()),
    )


def calibration(rows: Sequence[Row]) -> float:
    """How long operations run once more to predict a step's time: 5 s, or 1 / 20 of the run."""
    return min(5.0, 0.05 * sum(row["seconds"] for row in rows))


COMMAND = Run(Finetune, finetune)
