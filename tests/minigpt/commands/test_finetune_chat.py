"""`minigpt finetune --chat`: its losses are transformers', it resumes to the same bits, it says
what it leaves out, and the result answers by the template it has learned.
"""

import gzip
import json
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import minigpt
from minigpt.checkpoints.source import BUNDLED
from minigpt.commands import finetune, lessons
from minigpt.commands.cli import main
from minigpt.data.chat import ChatTemplate
from minigpt.models.llama import Llama, LlamaConfig
from tests.conftest import real_data

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

SHORT = ["--steps", "8", "--batch-size", "3", "--sequence-length", "192", "--evaluate-every", "4"]
LORA = ["--method", "lora", "--target", "query", "value", "--lr", "0.02"]


def rows(n: int = 24) -> list[dict[str, Any]]:
    """Conversations of several lengths; every fourth has a second turn."""
    made = []
    for i in range(n):
        messages = [
            {"role": "user", "content": f"Say {i} in words" + " please" * (i % 5) + "."},
            {"role": "assistant", "content": "one " * (1 + i % 7) + f"and {i}."},
        ]
        made.append({"messages": messages * 2 if i % 4 == 0 else messages})
    return made


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-Neo with the tokenizer of the bundled one, and rows beside it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = minigpt.Tokenizer.load("bundled")
    torch.manual_seed(0)
    config = minigpt.GPTNeoConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=256,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        window_size=8,
        initializer_range=0.2,
        bos_token_id=tokenizer.end_of_text,
        eos_token_id=tokenizer.end_of_text,
    )
    minigpt.save(minigpt.GPTNeo(config), folder / "model")
    tokenizer.save(folder / "model")
    written(folder, rows())
    return folder


def run(base: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(base / "model"), "--chat", str(base / "rows.jsonl")]
    return ["finetune", *given, "--out", str(out), *SHORT, *more]


def summary(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def heldout(rows: list[dict[str, Any]], share: float = 0.1, seed: int = 0) -> list[dict[str, Any]]:
    chosen = np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))]
    return [rows[i] for i in sorted(chosen)]


@torch.no_grad()
def oracle_loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Mean over the assistant's tokens of transformers' model, row by row."""
    total = n = 0.0
    for row in rows:
        out = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ids = torch.tensor([list(out["input_ids"])])
        labels = ids.where(torch.tensor([out["assistant_masks"]]) == 1, -100)
        k = int((labels[:, 1:] != -100).sum())
        total += model.eval()(input_ids=ids, labels=labels).loss.item() * k
        n += k
    return total / n


def their_tokenizer(model: Path, template: Path) -> Any:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    theirs.chat_template = (template / "chat_template.jinja").read_text(encoding="utf-8")
    return theirs


@pytest.mark.parametrize(
    ("template", "method", "packing"),
    [
        ("chatml", "full", []),
        ("alpaca", "lora", []),
        ("alpaca", "full", ["--no-packing"]),
        ("chatml", "lora", ["--no-packing"]),
    ],
    ids=["packed, full", "packed, lora", "grouped, full", "grouped, lora"],
)
def test_the_losses_are_those_of_transformers(
    template: str, method: str, packing: list[str], base: Path, tmp_path: Path
) -> None:
    options = LORA if method == "lora" else ["--method", "full", "--lr", "0.01"]
    out = tmp_path / "run"
    assert main(run(base, out, "--chat-template", template, *options, *packing)) == 0
    result = out / ("adapter" if method == "lora" else "model")
    tokenizer = their_tokenizer(base / "model", result)
    kept = heldout(rows())
    lines = (out / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"messages": row["messages"]} for row in kept]
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(base / "model")
    before = oracle_loss(theirs, tokenizer, kept)
    if method == "lora":
        theirs = peft.PeftModel.from_pretrained(theirs, result)
    else:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(result)
    after = oracle_loss(theirs, tokenizer, kept)
    told = summary(out)
    assert told["heldout_loss_before"] == pytest.approx(before, rel=1e-5)
    assert told["heldout_loss_after"] == pytest.approx(after, rel=1e-5)
    assert after < before
    assert (told["train_rows"], told["heldout_rows"], told["dropped_rows"]) == (22, 2, 0)
    learned = [row for row in rows() if row not in kept]
    outs = [
        tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        for row in learned
    ]
    assert told["labelled_tokens"] == sum(sum(out["assistant_masks"]) for out in outs)
    assert told["train_tokens"] == sum(len(out["input_ids"]) - 1 for out in outs)


def test_the_sample_answers_a_heldout_conversation(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(run(base, out, "--chat-template", "plain", *LORA)) == 0
    asked = heldout(rows())[0]["messages"][-2]["content"]
    before, after = (out / "sample.txt").read_text().split("\n\n--- after ---\n")
    assert before.startswith(f"--- before ---\n{asked}\n\n> ")
    assert after.startswith(f"{asked}\n\n> ")
    assert before.partition("> ")[2] != after.partition("> ")[2]


@contextmanager
def stopping(title: str, steps: int, tokens_a_step: int) -> Iterator[Any]:
    """In place of the progress bar: Ctrl-C after step 3."""
    yield lambda row: signal.raise_signal(signal.SIGINT) if row["step"] == 3 else None


DATED = "{{ strftime_now('%d %B') }}" + (
    "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content + '<|endoftext|>' }}"
    "{% endgeneration %}{% endfor %}"
)


@pytest.mark.parametrize("packing", [[], ["--no-packing"]], ids=["packed", "grouped"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    packing: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on another day, of which its template tells."""
    (tmp_path / "dated.jinja").write_text(DATED)
    more = ["--chat-template", str(tmp_path / "dated.jinja"), *LORA, *packing]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(run(base, whole, *more)) == 0
    monkeypatch.setattr(finetune, "progress_bar", stopping)
    assert main(run(base, parts, *more)) == 130
    monkeypatch.undo()

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date(2001, 2, 3)

    monkeypatch.setattr(lessons, "date", Tomorrow)
    assert main(["finetune", "--resume", "--out", str(parts)]) == 0
    for name in ("adapter/adapter_model.safetensors", "sample.txt", "adapter/chat_template.jinja"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    losses = [
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (whole, parts)
    ]
    assert losses[0] == losses[1]
    for name in ("heldout_loss_before", "heldout_loss_after", "labelled_tokens"):
        assert summary(whole)[name] == summary(parts)[name]
    other = tmp_path / "other"
    assert main(run(base, other, *more)) == 0  # the day does matter
    assert summary(other)["heldout_loss_before"] != summary(whole)["heldout_loss_before"]


@pytest.mark.parametrize("changed", ["rows.jsonl", "mine.jinja"])
def test_a_run_goes_on_with_what_it_has_read(
    changed: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(base / "model", tmp_path / "model")
    written(tmp_path, rows())
    (tmp_path / "mine.jinja").write_text(DATED)
    more = ["--chat-template", str(tmp_path / "mine.jinja"), *LORA]
    monkeypatch.setattr(finetune, "progress_bar", stopping)
    assert main(run(tmp_path, tmp_path / "run", *more)) == 130
    monkeypatch.undo()
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--resume", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert f"{changed} has changed since" in capsys.readouterr().err


def refused(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused and writes nothing."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert not out.exists() or not list(out.iterdir())
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    return line


REFUSED = {
    "a text, too": (["--text", "bundled-poe"], "give either --text or --chat"),
    "an encoder's objective": (["--objective", "mlm"], "--chat has --objective clm, not mlm"),
    "no template": ([], "has no chat template: .*; --chat-template gives it one: vistral, llama"),
    "an unknown template": (["--chat-template", "chatmll"], "no chat template chatmll.*chatml"),
    "a prompt": (
        ["--chat-template", "plain", "--method", "prompt", "--virtual-tokens", "3"],
        "add --no-packing",
    ),
    "PEFT's prefix": (
        ["--chat-template", "plain", "--method", "prefix", "--form", "peft"], "add --no-packing"
    ),
    "rows that are long": (
        ["--chat-template", "chatml", "--sequence-length", "32"],
        r"rows\.jsonl: 2\d of 24 rows have more tokens than --sequence-length 32: line 1 has \d+, "
        r"the longest \d+; raise it, or leave such rows out with --drop-long-rows",
    ),
    "all rows": (
        ["--chat-template", "chatml", "--sequence-length", "9", "--drop-long-rows"],
        "24 of 24 rows have more tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(
    case: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, reason = REFUSED[case]
    line = refused(run(base, tmp_path / "run", *options), tmp_path / "run", capsys)

    assert re.search(reason, line), line


@pytest.mark.parametrize("option", ["--chat-template plain", "--no-packing", "--drop-long-rows"])
def test_what_belongs_to_chat_is_refused_without(
    option: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(base / "model"), "--text", "bundled-poe", *option.split()]
    line = refused(["finetune", *given, "--out", str(tmp_path / "run")], tmp_path / "run", capsys)
    assert f"{option.split()[0]} belongs to --chat" in line
    given = ["finetune", "--model", str(base / "model"), "--out", str(tmp_path / "run")]
    assert "give either --text or --chat" in refused(given, tmp_path / "run", capsys)


def test_rows_that_teach_nothing_are_counted_and_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    }
    path = written(tmp_path, [*rows(3), bad, bad])
    arguments = run(base, tmp_path / "run", "--chat-template", "vistral")
    arguments[arguments.index("--chat") + 1] = str(path)
    line = refused(arguments, tmp_path / "run", capsys)
    assert "2 of 5 rows are not learned: line 4: the chat template fails: after the system" in line
    assert "; line 5: " in line


def test_what_is_left_out_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [{"messages": rows()[1]["messages"], "source": "web", "tools": [1]}]
    path = written(tmp_path, [*rows(), *more])
    arguments = run(base, tmp_path / "run", "--chat-template", "chatml", *LORA)
    arguments[arguments.index("--chat") + 1] = str(path)
    tokenizer = minigpt.Tokenizer.load(base / "model")
    template = ChatTemplate.choose("chatml", base / "model", tokenizer)
    texts = [template.text(row["messages"]) for row in [*rows(), *more]]
    lengths = [len(tokenizer.encode(text)) - 1 for text in texts]  # the last is not read
    limit = sorted(lengths)[15]
    arguments[arguments.index("--sequence-length") + 1] = str(limit)
    assert main([*arguments, "--drop-long-rows"]) == 0
    err = capsys.readouterr().err
    told = summary(tmp_path / "run")
    assert told["dropped_rows"] == sum(n > limit for n in lengths) > 0
    assert told["dropped_rows"] + told["train_rows"] + told["heldout_rows"] == 25
    assert (
        f"{told['dropped_rows']} of 25 rows have more tokens than --sequence-length {limit}" in err
    )
    assert "they are left out" in err
    assert "fields that are not read: source (line 25), tools (line 25)" in err
    assert "generation will not know where to stop" in err  # <|im_end|> is no token of it


def test_an_end_that_is_learned_needs_no_words(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run(base, tmp_path / "run", "--chat-template", "alpaca", *LORA)) == 0
    err = capsys.readouterr().err
    assert "where to stop" not in err
    assert "not read" not in err


def test_methods_with_vectors_before_the_tokens_learn_row_by_row(
    base: Path, tmp_path: Path
) -> None:
    for i, method in enumerate((["prompt"], ["prefix", "--form", "peft"], ["prefix"])):
        out = tmp_path / str(i)
        options = ["--chat-template", "plain", "--no-packing", "--method", *method]
        assert main(run(base, out, *options, "--virtual-tokens", "3")) == 0
        told = summary(out)
        assert told["heldout_loss_after"] < told["heldout_loss_before"]


def test_generation_answers_by_the_template_that_was_learned(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learned = ["--chat-template", "alpaca", *LORA, "--steps", "60"]
    assert main(run(base, tmp_path / "run", *learned)) == 0
    adapter = ["--adapter", str(tmp_path / "run" / "adapter")]
    ask = ["generate", "--model", str(base / "model"), "--chat", "--prompt", "Say 3 in words.",
           "--temperature", "0", "--max-new-tokens", "30"]  # fmt: skip
    capsys.readouterr()
    told = []
    for more in (adapter, [*adapter, "--chat-template", "alpaca"], ["--chat-template", "alpaca"],
                 [*adapter, "--chat-template", "plain"]):  # fmt: skip
        assert main([*ask, *more]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]
    assert told[0] != told[3]
    with pytest.raises(SystemExit):
        main(ask)
    assert "has no chat template" in capsys.readouterr().err
    without = [x for x in ask if x != "--chat"]
    with pytest.raises(SystemExit):
        main([*without, "--chat-template", "plain"])
    assert "--chat-template belongs to --chat" in capsys.readouterr().err


def test_the_bundled_rows_teach_the_bundled_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["--model", "bundled", "--chat", "bundled-answers", "--chat-template", "plain"]
    assert main(["finetune", *given, "--out", str(out), *SHORT, "--steps", "12", *LORA]) == 0
    told = summary(out)
    assert told["heldout_loss_after"] < told["heldout_loss_before"] - 1
    assert (told["train_rows"], told["heldout_rows"]) == (54, 6)
    assert BUNDLED["bundled"].exists()


def vietnamese_rows(file: Path, n: int) -> list[dict[str, Any]]:
    """Questions about a sentence of a paragraph, and their answers, of the first n articles."""
    content = json.loads(gzip.decompress(file.read_bytes()))
    made = []
    for article in content["data"][:n]:
        for paragraph in article["paragraphs"][:2]:
            for question in paragraph["qas"][:3]:
                answer = question["answers"][0]
                start = max(0, answer["answer_start"] - 40)
                near = paragraph["context"][start : answer["answer_start"] + 40]
                asked = f"{near}\n\n{question['question']}"
                made.append({"prompt": asked, "completion": answer["text"]})
    return made


def test_vietnamese_questions_by_vistrals_template(tmp_path: Path) -> None:
    """From XQuAD to an adapter: a tiny Mistral with Mistral's tokenizer, as Vistral has them."""
    questions = real_data("instructions", "xquad_vi.json.gz")
    tokenizer = real_data("tokenizers", "mistral_v1")
    made = vietnamese_rows(questions, 6)
    written(tmp_path, made)
    torch.manual_seed(0)
    config = LlamaConfig(
        model_type="mistral",
        vocab_size=32000,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=32,
    )
    minigpt.save(Llama(config), tmp_path / "model")
    shutil.copyfile(tokenizer / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    out = tmp_path / "run"
    sizes = ["--sequence-length", "500", "--batch-size", "2", "--lr", "0.02", "--steps", "12"]
    options = ["--chat-template", "vistral", "--method", "lora", "--target", "all-linear", *sizes]
    assert main(run(tmp_path, out, *options)) == 0
    told = summary(out)
    assert told["train_rows"] + told["heldout_rows"] == len(made) > 30
    assert told["heldout_loss_after"] < told["heldout_loss_before"]
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = peft.PeftModel.from_pretrained(theirs, out / "adapter")
    messages = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in made
    ]
    oracle = oracle_loss(
        theirs, their_tokenizer(tmp_path / "model", out / "adapter"), heldout(messages)
    )
    assert told["heldout_loss_after"] == pytest.approx(oracle, rel=1e-4)
    text = their_tokenizer(tmp_path / "model", out / "adapter").apply_chat_template(
        messages[0]["messages"], tokenize=False
    )
    assert text == f"<s>[INST] {made[0]['prompt'].strip()} [/INST] {made[0]['completion']} </s>"
