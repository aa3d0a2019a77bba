"""Text -> windows of tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.data.text import RandomWindows, consecutive_windows, read_text, split_text


def written(folder: Path, content: bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content)
    return path


def test_read_text_drops_gutenberg_frame_mark_and_carriage_returns(tmp_path: Path) -> None:
    content = (
        b"\xef\xbb\xbfThe Project Gutenberg eBook\r\n"
        b"*** START OF THE PROJECT GUTENBERG EBOOK 11 ***\r\n"
        b"Alice\r\n\r\nna\xc3\xafve\r\n"
        b"*** END OF THE PROJECT GUTENBERG EBOOK 11 ***\r\nlicense\r\n"
    )
    assert read_text(written(tmp_path, content)) == "Alice\n\nnaïve"


def test_read_text_of_a_plain_text_is_the_text(tmp_path: Path) -> None:
    assert read_text(written(tmp_path, b"\xef\xbb\xbfone\r\ntwo\n")) == "one\ntwo\n"


START = "*** START OF THIS PROJECT GUTENBERG EBOOK THE RAVEN ***\n"
END = "***END OF THE PROJECT GUTENBERG EBOOK THE RAVEN***\n"
WHOLE = {
    "a part": "one\n" * 50 + "*** END OF PART ONE ***\n" + "two\n" * 950,
    "a start alone": "a\n" + START + "b\n",
    "an end alone": "a\n" + END + "b\n",
    "the wrong order": "a\n" + END + "b\n" + START + "c\n",
    "within a line": f"a\n> {START}b\n> {END}",
    "a start far inside": "a\n" * 20_000 + START + "b\n" + END,
    "an end far from the end": START + "b\n" + END + "a\n" * 20_000,
}


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_what_is_no_frame_of_gutenberg_is_kept(text: str, tmp_path: Path) -> None:
    assert read_text(written(tmp_path, text.encode())) == text


def test_older_frames_and_a_long_licence_are_dropped(tmp_path: Path) -> None:
    text = "header\n" * 2000 + START + "\nOnce upon\n" + END + "licence\n" * 2400
    assert read_text(written(tmp_path, text.encode())) == "\nOnce upon"


@pytest.mark.parametrize(
    "content",
    [b"one\ntwo\nth\0ree\n\0", "one\n".encode("utf-16-le")],
    ids=["a NUL byte", "UTF-16 without a mark"],
)
def test_a_nul_byte_is_refused_with_its_line(content: bytes, tmp_path: Path) -> None:
    line = content[: content.index(b"\0")].count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"text\.txt, line {line} holds a NUL character"):
        read_text(written(tmp_path, content))


def test_errors_of_read_text_are_one_line_with_the_path(tmp_path: Path) -> None:
    bad = written(tmp_path, b"caf\xe9\n")
    for path, reason in (
        (bad, "not UTF-8 text: .* at byte 3"),
        (tmp_path / "none.txt", "No such file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            read_text(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("heldout", [0.1, 0.25, 0.5])
def test_split_text_cuts_after_a_line(heldout: float) -> None:
    text = "".join(f"line {i}\n" for i in range(200))
    train, rest = split_text(text, heldout)
    assert train + rest == text
    assert train.endswith("\n")
    assert len(rest) == pytest.approx(heldout * len(text), abs=len("line 200\n"))
    assert len(rest) >= heldout * len(text) - 1


def test_split_text_of_one_line_cuts_after_a_space() -> None:
    assert split_text("one two three four five " * 9, 0.3) == (
        "one two three four five " * 6 + "one ",
        "two three four five " + "one two three four five " * 2,
    )


SHAPES = {
    "lines": "a line of some words\n" * 2000,
    "a line, then words": "A preface.\n" + "word " * 8000 + "\n",
    "a line, then no space": "A preface. " + "x" * 40_000,
    "paragraphs": ("word " * 400 + "\n") * 20,
    "line ends at the end": "word " * 8000 + "\n" * 100,
}


@pytest.mark.parametrize("heldout", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
def test_split_text_keeps_the_share(text: str, heldout: float) -> None:
    train, rest = split_text(text, heldout)
    assert train + rest == text
    share = len(rest) / len(text)
    assert heldout - 1e-4 <= share <= heldout + 0.1 * min(heldout, 1 - heldout) + 1e-4


@pytest.mark.parametrize(
    ("near", "kept"),
    [("\n    y z", "\n"), ("     y z", " y "), ("xxxxxxxxx", "x"), ("\n" + "x" * 11, "x")],
    ids=["a line", "a space", "neither", "too far"],
)
def test_split_text_prefers_a_line_to_a_space_and_a_space_to_nothing(near: str, kept: str) -> None:
    train, _ = split_text((near + "x" * 101).rjust(1000, "x"), 0.101)
    assert train.endswith(kept), train[-20:]
    assert (len(train) == 899) == (kept == "x")


def test_split_text_beside_a_search_over_every_cut() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(
            random.choice([*"ab \n"], random.integers(1, 90), p=[0.47, 0.47, 0.04, 0.02])
        )
        heldout = float(random.choice([0.05, 0.1, 0.3, 0.5, 0.8]))
        limit = round(len(text) * (1 - heldout))
        smaller = min(limit, len(text) - limit)
        near = [cut for cut in range(limit, 0, -1) if 10 * (limit - cut) <= smaller]
        lines = [cut for cut in near if text[cut - 1] == "\n"]
        spaces = [cut for cut in near if text[cut - 1] == " "]
        want = [*lines, *spaces, limit][0]
        assert split_text(text, heldout) == (text[:want], text[want:])


def test_random_windows_are_a_function_of_seed_and_number() -> None:
    tokens = torch.arange(1000)

    def windows(seed: int) -> RandomWindows:
        return RandomWindows(tokens, 7, 4, seed)

    batches = windows(5)
    torch.manual_seed(1)
    first = [batches(i)["input_ids"] for i in range(6)]
    torch.manual_seed(2)
    again = [windows(5)(i)["input_ids"] for i in reversed(range(6))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    for i in range(5):
        assert not torch.equal(first[i], first[i + 1])
        assert not torch.equal(first[i], windows(6)(i)["input_ids"])
    state = torch.get_rng_state()
    batches(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_windows_are_pieces_of_the_text_with_labels_one_ahead() -> None:
    tokens = 3 * torch.arange(50, dtype=torch.int32)
    batch = RandomWindows(tokens, 7, 20, 0)(0)
    assert batch["input_ids"].shape == batch["labels"].shape == (20, 7)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"] + 3)
    assert torch.equal(batch["input_ids"].diff(dim=1), torch.full((20, 6), 3))


def test_random_windows_begin_at_every_place_from_first_to_last() -> None:
    batches = RandomWindows(torch.arange(9), 4, 8, 0)
    starts = {int(s) for i in range(30) for s in batches(i)["input_ids"][:, 0]}
    assert starts == set(range(5))  # 0 .. n - T - 1


def test_random_windows_of_a_text_that_is_too_short() -> None:
    RandomWindows(torch.arange(5), 4, 1, 0)(0)
    with pytest.raises(ValueError, match="4 tokens to train on, a window of 4 needs at least 5"):
        RandomWindows(torch.arange(4), 4, 1, 0)


@pytest.mark.parametrize("n", [2, 5, 8, 9, 10, 41])
def test_consecutive_windows_predict_each_token_once(n: int) -> None:
    tokens = torch.arange(100, 100 + n, dtype=torch.int16)
    batches = list(consecutive_windows(tokens, 4, 3))
    labels = torch.cat([b["labels"].flatten() for b in batches])
    inputs = torch.cat([b["input_ids"].flatten() for b in batches])
    counted = labels != -100
    assert torch.equal(labels[counted], tokens[1:].long())
    assert torch.equal(inputs[counted], tokens[:-1].long())
    assert all(b["input_ids"].size(1) == 4 for b in batches)
    assert all((b["labels"] != -100).any() and len(b["labels"]) <= 3 for b in batches)


def test_consecutive_windows_need_two_tokens() -> None:
    with pytest.raises(ValueError, match="1 tokens, at least 2"):
        list(consecutive_windows(torch.arange(1), 4, 3))
