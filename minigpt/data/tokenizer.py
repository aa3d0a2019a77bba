"""Text <-> token ids, through the `tokenizers` library and the files beside a checkpoint."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from minigpt.checkpoints import gguf
from minigpt.checkpoints.source import named
from minigpt.data import tokenizer_files
from minigpt.data.phobert import Phobert
from minigpt.data.tokenizer_files import BERT, ROBERTA
from peft_lite.json_files import printable, short

MARKS = 2  # [CLS] before a text and [SEP] after it
UNUSED_ROWS = 1024  # an embedding may be rounded up to this many rows more than it has tokens
MOST_TOKENS = 2**20  # learned; the largest published vocabularies have some 2^18
PIECE = 2**17  # characters that the library encodes at a time; each takes some 200 bytes meanwhile
LONGEST = 2**23  # and at most: more than a novel, 1.6 GB
CUT = re.compile(r"(?<=\S)[ \n]")
SPACE = re.compile(r"(?<=\S) ")


class Special(NamedTuple):
    """Ids of the special tokens of an encoder."""

    pad: int
    unknown: int
    first: int
    last: int
    mask: int


class Tokenizer:
    """A tokenizer of the library's, from one of the kinds of files that
    minigpt/data/tokenizer_files.py reads.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        if backend.get_vocab_size() == 0:
            raise ValueError("the tokenizer's vocabulary is empty")
        backend.no_padding()  # some files ask for padding and truncation
        backend.no_truncation()
        self.backend = backend

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads the first of the kinds of files that the directory holds, and what
        tokenizer_config.json and older files say beside it, as transformers does; or that of a
        .gguf file.  A name such as "bundled" stands for its directory.

        Raises:
            ValueError: there is none, it cannot be read, its vocabulary is empty, or an added
                token has another id than the next.
        """
        folder = named(directory)
        if folder.suffix == ".gguf":
            return cls(gguf.opened(folder).tokenizer())
        try:
            backend = tokenizer_files.read(folder)
            if backend is not None:
                return PhobertTokenizer(backend) if isinstance(backend, Phobert) else cls(backend)
        except Exception as error:  # the library raises bare Exception for a broken file
            reason = printable(str(error))
            raise ValueError(f"cannot read the tokenizer in {folder}: {reason}") from None
        raise ValueError(
            f"no tokenizer in {folder}: want tokenizer.json, vocab.json and merges.txt, "
            "vocab.txt, or vocab.txt and bpe.codes"
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE (https://arxiv.org/abs/1508.07909) learned from `texts`, with one special
        token, `<|endoftext|>`.

        Raises:
            ValueError: the size is out of range, or a text is not Unicode or too long without a
                place to cut it.
        """
        _check_size(vocab_size)
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_all_pieces(texts), trainer)
        return cls(backend)

    @classmethod
    def train_word_piece(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """WordPiece (https://arxiv.org/abs/1609.08144) learned from `texts` in lower case without
        accents, with BERT's five special tokens as ids 0 to 4.

        Raises:
            ValueError: the size is out of range, or a text is not Unicode or too long without a
                place to cut it.
        """
        _check_size(vocab_size)
        texts = list(_all_pieces(texts))
        learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        learner.normalizer = normalizers.BertNormalizer(lowercase=True)
        learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        characters = {c for text in texts for c in learner.normalizer.normalize_str(text)}
        # the library numbers the inner pieces of one character anew in every run, unless given here
        inner = sorted(f"##{c}" for c in characters if not c.isspace())
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*BERT, *inner], show_progress=False
        )
        learner.train_from_iterator(texts, trainer)
        model = models.WordPiece(learner.get_vocab(), unk_token="[UNK]")
        backend = tokenizer_files.word_pieces(model)
        backend.add_special_tokens([*BERT])
        return cls(backend)

    def save(self, directory: str | Path) -> None:
        self.backend.save(str(Path(directory) / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the special tokens that some tokenizers put around it.

        Raises:
            ValueError: half of a surrogate pair, a piece that the vocabulary has no token for, or a
                long text without a place to cut it.
        """
        return [i for piece in self.pieces(text) for i in self._encode(piece)]

    def ids(self, text: str, observe: Callable[[int], None] = lambda done: None) -> Tensor:
        """The same as a tensor (n,) of 4 bytes a token, for long texts.

        Args:
            observe: called with the number of characters done, piece by piece.
        """
        ids, done = [torch.empty(0, dtype=torch.int32)], 0
        for piece in self.pieces(text):
            ids.append(torch.tensor(self._encode(piece), dtype=torch.int32))
            done += len(piece)
            observe(done)
        return torch.cat(ids)

    def with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, as `encode`, and the characters [start, stop) that each stands for.

        The places leave nothing out: a token begins where the one before it ends, unless both
        are parts of one character.

        Raises:
            ValueError: as `encode`.
        """
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        begin = last = 0  # of the piece, of the token before
        for piece in self.pieces(text):
            encoding = self._placed(piece)
            ids += encoding.ids
            for start, stop in encoding.offsets:
                start, last = min(begin + start, last), max(begin + stop, last)
                places.append((start, last))
            begin += len(piece)
        return ids, places

    def pieces(self, text: str, size: int = PIECE) -> Iterator[str]:
        """Parts of `text` of some `size` characters, whose ids side by side are those of the whole.

        A text is cut before a space or a line end that follows something else.  No word of GPT-2's
        expression and none of BERT's goes on there, and neither looks back.  Tokenizers of other
        kinds may join what stands on both sides, so they get the text in one piece.

        Raises:
            ValueError: a piece would have more than `LONGEST` characters.
        """
        return _pieces(text, size, self._cut())

    def _encode(self, text: str) -> list[int]:
        with _readable(text):  # "fast": without the place of each token in the text
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _placed(self, text: str) -> tokenizers.Encoding:
        with _readable(text):
            return self.backend.encode(text, add_special_tokens=False)

    def _cut(self) -> re.Pattern[str] | None:
        """Where tokens end in every text."""
        words, normalizer = self.backend.pre_tokenizer, self.backend.normalizer
        steps: list[Any] = [words]
        if isinstance(words, pre_tokenizers.Sequence):
            steps = [*words]  # type: ignore[misc]  # it has items and no length
        *before, words = steps
        if isinstance(words, pre_tokenizers.ByteLevel):
            plain = words.use_regex and not words.add_prefix_space and normalizer is None
            plain = plain and all(isinstance(step, pre_tokenizers.Digits) for step in before)
        else:
            plain = isinstance(words, pre_tokenizers.BertPreTokenizer) and not before
            plain = plain and isinstance(normalizer, normalizers.BertNormalizer | None)
        return CUT if plain and not self._joins_words() else None

    def _joins_words(self) -> bool:
        """Whether a token may hold white space, or take that after it."""
        added = self.backend.get_added_tokens_decoder().values()
        return any(token.rstrip or re.search(r"\s", token.content) for token in added)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def start(self) -> list[int]:
        """The ids that its file puts before a text, such as `<s>`."""
        text = self.backend.encode("a", add_special_tokens=True)
        marks = zip(text.ids, text.special_tokens_mask, strict=True)
        return [i for i, _ in takewhile(lambda mark: mark[1] == 1, marks)]

    @property
    def end_of_text(self) -> int | None:
        """The id that separates texts, if the vocabulary has one."""
        added = self.backend.get_added_tokens_decoder().items()
        ids = {token.content: i for i, token in added}  # RoBERTa's <|endoftext|> is an odd word
        return next((ids[t] for t in ("<|endoftext|>", "</s>", "[SEP]") if t in ids), None)

    @property
    def special(self) -> Special:
        """The ids of BERT's special tokens, or of RoBERTa's.

        Raises:
            ValueError: the tokenizer lacks one of either kind.
        """
        kinds = [{t: self.backend.token_to_id(t) for t in kind} for kind in (BERT, ROBERTA)]
        present = [[i for i in ids.values() if i is not None] for ids in kinds]
        best = max(present, key=len)
        if len(best) == len(BERT):
            return Special(*best)
        ids = kinds[present.index(best)]
        missing = ", ".join(token for token, i in ids.items() if i is None)
        raise ValueError(
            f"the tokenizer lacks {missing}: it is of neither BERT's nor RoBERTa's kind"
        )

    def check(self, vocab_size: int) -> None:
        """Raises ValueError unless a model with `vocab_size` rows of embeddings fits."""
        if not self.vocab_size <= vocab_size < self.vocab_size + UNUSED_ROWS:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens, the model's vocabulary {vocab_size}: "
                "they do not belong together"
            )


class PhobertTokenizer(Tokenizer):
    """PhoBERT's, which is ours (minigpt/data/phobert.py) and not the library's."""

    backend: Phobert  # type: ignore[assignment]

    def __init__(self, backend: Phobert) -> None:
        self.backend = backend

    def save(self, directory: str | Path) -> None:
        self.backend.save(Path(directory))

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(ids)

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text)

    def _placed(self, text: str) -> tokenizers.Encoding:
        raise ValueError("PhoBERT's tokenizer does not say where a token stands in the text")

    def _cut(self) -> re.Pattern[str] | None:
        """A line end belongs to the word before it, a space to none."""
        return None if self._joins_words() else SPACE


@contextmanager
def _readable(text: str) -> Iterator[None]:
    """Turns the library's own errors about a text into a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot encode {short(text)}: {printable(str(error))}") from None


def _check_size(vocab_size: int) -> None:
    """The library aborts the process where it cannot reserve room for so many."""
    if not 1 <= vocab_size <= MOST_TOKENS:
        raise ValueError(f"vocab_size is {vocab_size}, must be 1 to {MOST_TOKENS:,}")


def _all_pieces(texts: Iterable[str]) -> Iterator[str]:
    """What a trainer reads: it counts words, and they end where texts are cut."""
    for text in texts:
        yield from _pieces(text, PIECE, CUT)


def _pieces(text: str, size: int, cut: re.Pattern[str] | None) -> Iterator[str]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = short(text[max(0, error.start - 20) : error.start + 20])
        raise ValueError(
            f"cannot encode {near}: it holds half of a surrogate pair, character {error.start}"
        ) from None
    start = 0
    while start < len(text):
        place = cut.search(text, start + size) if cut else None
        end = place.start() if place else len(text)
        if end - start > LONGEST:
            raise ValueError(
                f"the text has {end - start:,} characters that this tokenizer takes in one piece, "
                f"at most {LONGEST:,} fit"
            )
        yield text[start:end]
        start = end
