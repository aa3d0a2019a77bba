"""Text <-> token ids, through the `tokenizers` library and the files beside a checkpoint."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from minigpt.checkpoints import gguf
from minigpt.checkpoints.source import named
from peft_lite.json_files import check_types, printable, read_object, short

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")  # of an added token
MARKS = 2  # [CLS] before a text and [SEP] after it
SETTINGS: dict[str, Any] = {  # of tokenizer_config.json, where they change the ids
    "do_lower_case": bool,
    "strip_accents": bool | None,
    "tokenize_chinese_chars": bool,
    "add_prefix_space": bool | None,
    "added_tokens_decoder": dict[str, dict[str, str | bool]] | None,
}
UNUSED_ROWS = 1024  # an embedding may be rounded up to this many rows more than it has tokens
MOST_TOKENS = 2**20  # learned; the largest published vocabularies have some 2^18
PIECE = 2**17  # characters that the library encodes at a time; each takes some 200 bytes meanwhile
LONGEST = 2**23  # and at most: more than a novel, 1.6 GB
CUT = re.compile(r"(?<=\S)[ \n]")


class Special(NamedTuple):
    """Ids of the special tokens of BERT and RoBERTa."""

    pad: int
    unknown: int
    first: int
    last: int
    mask: int


class Tokenizer:
    """A tokenizer of one of three kinds of files: `tokenizer.json`, `vocab.json` and `merges.txt`
    (byte-level BPE), or `vocab.txt` (WordPiece).
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        if backend.get_vocab_size() == 0:
            raise ValueError("the tokenizer's vocabulary is empty")
        backend.no_padding()  # some files ask for padding and truncation
        backend.no_truncation()
        self.backend = backend

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads the first of the three kinds of files that the directory holds, and what
        tokenizer_config.json and added_tokens.json say beside it, as transformers does; or that of
        a .gguf file.  A name such as "bundled" stands for its directory.

        Raises:
            ValueError: there is none, it cannot be read, its vocabulary is empty, or an added
                token has another id than the next.
        """
        folder = named(directory)
        if folder.suffix == ".gguf":
            return cls(gguf.opened(folder).tokenizer())
        try:
            backend = _read(folder)
            if backend is not None:
                settings = _optional(folder / "tokenizer_config.json")
                check_types(settings, SETTINGS, "tokenizer_config.json: ")
                _apply(settings, backend)
                _add_tokens(settings, _optional(folder / "added_tokens.json"), backend)
                return cls(backend)
        except Exception as error:  # the library raises bare Exception for a broken file
            reason = printable(str(error))
            raise ValueError(f"cannot read the tokenizer in {folder}: {reason}") from None
        raise ValueError(
            f"no tokenizer in {folder}: want tokenizer.json, vocab.json and merges.txt, "
            "or vocab.txt"
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
            vocab_size=vocab_size, special_tokens=[*SPECIAL, *inner], show_progress=False
        )
        learner.train_from_iterator(texts, trainer)
        return cls(_bert(models.WordPiece(learner.get_vocab(), unk_token="[UNK]")))

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

    def pieces(self, text: str, size: int = PIECE) -> Iterator[str]:
        """Parts of `text` of some `size` characters, whose ids side by side are those of the whole.

        A text is cut before a space or a line end that follows something else.  No word of GPT-2's
        expression and none of BERT's goes on there, and neither looks back.  Tokenizers of other
        kinds may join what stands on both sides, so they get the text in one piece.

        Raises:
            ValueError: a piece would have more than `LONGEST` characters.
        """
        return _pieces(text, size, self._splits_words())

    def _encode(self, text: str) -> list[int]:
        try:  # "fast": without the place of each token in the text
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # the library's own kinds
            raise ValueError(f"cannot encode {short(text)}: {printable(str(error))}") from None

    def _splits_words(self) -> bool:
        """Whether tokens end where `CUT` matches."""
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
        added = self.backend.get_added_tokens_decoder().values()
        return plain and not any(t.rstrip or re.search(r"\s", t.content) for t in added)

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
        ids = (self.backend.token_to_id(token) for token in ("<|endoftext|>", "</s>", "[SEP]"))
        return next((i for i in ids if i is not None), None)

    @property
    def special(self) -> Special:
        """The ids of BERT's special tokens, or of RoBERTa's.  Raises ValueError where the tokenizer
        has neither all of the ones nor all of the others.
        """
        for tokens in (SPECIAL, ROBERTA):
            ids = [i for token in tokens if (i := self.backend.token_to_id(token)) is not None]
            if len(ids) == len(tokens):
                return Special(*ids)
        missing = ", ".join(t for t in SPECIAL if self.backend.token_to_id(t) is None)
        raise ValueError(
            f"the tokenizer lacks {missing}: it is neither of BERT's kind nor of RoBERTa's"
        )

    def check(self, vocab_size: int) -> None:
        """Raises ValueError unless a model with `vocab_size` rows of embeddings fits."""
        if not self.vocab_size <= vocab_size < self.vocab_size + UNUSED_ROWS:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens, the model's vocabulary {vocab_size}: "
                "they do not belong together"
            )


def _read(folder: Path) -> tokenizers.Tokenizer | None:
    """From the first kind of files that is there."""
    if (folder / "tokenizer.json").exists():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _byte_level_bpe(folder)
    if (folder / "vocab.txt").exists():
        return _bert(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    return None


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _apply(settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """What tokenizer_config.json sets takes the place of what the tokenizer's own file says."""
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        normalizer.lowercase = settings.get("do_lower_case", normalizer.lowercase)
        normalizer.strip_accents = settings.get("strip_accents", normalizer.strip_accents)
        chinese = settings.get("tokenize_chinese_chars", normalizer.handle_chinese_chars)
        normalizer.handle_chinese_chars = chinese
    if isinstance(splitter, pre_tokenizers.ByteLevel):
        space = settings.get("add_prefix_space")
        splitter.add_prefix_space = splitter.add_prefix_space if space is None else space


def _add_tokens(
    settings: Mapping[str, Any], ids: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> None:
    """The tokens that were added to a vocabulary: of tokenizer_config.json, then of
    added_tokens.json, each under the id that the file gives it.
    """
    check_types({"added_tokens.json": ids}, {"added_tokens.json": dict[str, int]})
    described = settings.get("added_tokens_decoder") or {}
    tokens = [
        (int(number), AddedToken(fields["content"], **{n: fields[n] for n in FLAGS if n in fields}))
        for number, fields in described.items()
    ]
    known = {token.content for _, token in tokens}
    tokens += [(i, AddedToken(token)) for token, i in ids.items() if token not in known]
    for number, token in sorted(tokens, key=lambda pair: pair[0]):
        backend.add_tokens([token])
        if (given := backend.token_to_id(token.content)) != number:
            raise ValueError(f"token {short(token.content)} has id {number}, would get {given}")


def _check_size(vocab_size: int) -> None:
    """The library aborts the process where it cannot reserve room for so many."""
    if not 1 <= vocab_size <= MOST_TOKENS:
        raise ValueError(f"vocab_size is {vocab_size}, must be 1 to {MOST_TOKENS:,}")


def _all_pieces(texts: Iterable[str]) -> Iterator[str]:
    """What a trainer reads: it counts words, and they end where texts are cut."""
    for text in texts:
        yield from _pieces(text, PIECE, True)


def _pieces(text: str, size: int, splits_words: bool) -> Iterator[str]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = short(text[max(0, error.start - 20) : error.start + 20])
        raise ValueError(
            f"cannot encode {near}: it holds half of a surrogate pair, character {error.start}"
        ) from None
    start = 0
    while start < len(text):
        place = CUT.search(text, start + size) if splits_words else None
        end = place.start() if place else len(text)
        if end - start > LONGEST:
            raise ValueError(
                f"the text has {end - start:,} characters that this tokenizer takes in one piece, "
                f"at most {LONGEST:,} fit"
            )
        yield text[start:end]
        start = end


def _byte_level_bpe(folder: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _bert(model: models.WordPiece) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = {token: backend.token_to_id(token) for token in SPECIAL}
    if special["[UNK]"] is None:
        raise ValueError("the vocabulary lacks [UNK], the token of unknown words")
    backend.add_special_tokens([t for t, i in special.items() if i is not None])
    first, last = special["[CLS]"], special["[SEP]"]
    if first is not None and last is not None:
        backend.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    return backend
