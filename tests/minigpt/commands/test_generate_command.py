"""`minigpt generate`: what it prints, as it comes; several prompts; conversations; ends."""

import json
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt.checkpoints.config import end_ids
from minigpt.commands import generate
from minigpt.commands.cli import main
from minigpt.commands.generate import Continuation, left_padded
from minigpt.data.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny Llama, with the tokenizer of the bundled model."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("bundled")
    config = minigpt.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.5,
    )  # fmt: skip
    minigpt.save(minigpt.Llama(config), path)
    tokenizer.save(path)
    return path


def ask(folder: Path, *prompts: str, more: tuple[str, ...] = ()) -> list[str]:
    return ["generate", "--model", str(folder), "--prompt", *prompts, "--temperature", "0",
            "--max-new-tokens", "12", *more]  # fmt: skip


def expected(folder: Path, prompt: str) -> str:
    """The continuation alone, by a greedy search without caches."""
    model, tokenizer = minigpt.load(folder), Tokenizer.load(folder)
    ids = torch.tensor([tokenizer.encode(prompt)])
    ends = {tokenizer.end_of_text}
    for _ in range(12):
        new = model(ids)[:, -1:].argmax(-1)
        if new.item() in ends:
            break
        ids = torch.cat([ids, new], 1)
    return tokenizer.decode(ids[0].tolist())[len(prompt) :]


def test_several_prompts_are_continued_as_each_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ("The cat", "Alice was beginning to get very tired of sitting", "x")
    assert main(ask(folder, *prompts)) == 0
    alone = [prompt + expected(folder, prompt) for prompt in prompts]
    assert capsys.readouterr().out == "\n---\n".join(alone) + "\n"
    for prompt, text in zip(prompts, alone, strict=True):
        assert main(ask(folder, prompt)) == 0
        assert capsys.readouterr().out == text + "\n"


def test_chat_prints_the_answer_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert main(ask(folder, "Who are you?", more=("--chat",))) == 0
    answer = expected(folder, "[user] Who are you? [assistant] ")
    assert capsys.readouterr().out == answer + "\n"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit) as end:
        main(ask(folder, "Who are you?", more=("--chat",)))
    assert end.value.code == 2
    assert "has no chat template" in capsys.readouterr().err


def test_text_is_printed_as_it_comes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def slow(*args: object, observe: object, **settings: object) -> None:
        for i in Tokenizer.load(folder).encode(" sat down"):
            observe(torch.tensor([[i]]))  # type: ignore[operator]
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr(generate, "generate", slow)
    assert main(ask(folder, "The cat")) == 0
    assert len(shown) > 1
    assert all(shown)
    assert "".join(shown) == "The cat sat down"


def test_half_a_character_waits_for_the_rest() -> None:
    tokenizer = Tokenizer.load("bundled")
    text = "ế 🙂 ok"
    ids = tokenizer.encode(text)
    part = Continuation(tokenizer, tokenizer.encode("é"), {0})
    taken = []
    for i in ids:
        part.add(i)
        taken.append(part.take())
    assert "".join(taken) == text
    assert "" in taken  # of the first bytes of a character
    assert "\ufffd" not in "".join(taken)
    half = Continuation(tokenizer, [], {0})
    half.add(ids[0])
    assert half.take() == ""
    assert half.take(whole=True) == "\ufffd"


def test_nothing_comes_after_the_end() -> None:
    tokenizer = Tokenizer.load("bundled")
    a, b = tokenizer.encode("ab")[0], tokenizer.encode("c")[0]
    text = Continuation(tokenizer, [], {b})
    for i in (a, b, a):
        text.add(i)
    assert text.take(whole=True) == tokenizer.decode([a])


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        (None, None, ()),
        (None, 7, (7,)),
        ([3, 5], 7, (3, 5)),
        (4, None, (4,)),
        ([3, 99_999], None, (3,)),
    ],
)
def test_ends_are_those_that_the_checkpoint_names(
    generation: object, config: object, ids: tuple[int, ...], folder: Path, tmp_path: Path
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_ids(tmp_path, 512) == ids


def test_an_end_that_is_no_id_is_refused(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match="eos_token_id"):
        end_ids(tmp_path, 512)


def test_padding_stands_at_the_left() -> None:
    ids, mask = left_padded([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
