"""PhoBERT's tokenizer.  Nguyen and Nguyen 2020, https://arxiv.org/abs/2003.00744

Byte-pair encoding (Sennrich et al. 2015, https://arxiv.org/abs/1508.07909) of words:

    vocab.txt    a line a token, `token count`: ids 4, 5, ... after <s> <pad> </s> <unk>
    bpe.codes    a line a merge, `left right count`, the first to be applied first

A word is a run without white space, with the line end after it, and its last character carries
`</w>`.  Of the pairs that stand side by side in it the one with the earliest merge is joined
wherever it stands, until no pair has a merge.  A piece that does not end the word is written with
`@@`; one that vocab.txt lacks is <unk>.

The `tokenizers` library cannot do this: its merges have to end in tokens of the vocabulary, and
2,118 of PhoBERT's do not.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from heapq import heappop, heappush
from pathlib import Path

from tokenizers import AddedToken

from peft_lite import storage
from peft_lite.json_files import read_text, short

FILES = ("vocab.txt", "bpe.codes")
FIRST = ("<s>", "<pad>", "</s>", "<unk>")
UNKNOWN = "<unk>"
END, JOIN = "</w>", "@@"
WORD = re.compile(r"\S+\n?")
FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")


class Phobert:
    """Text <-> ids, with the methods of a `tokenizers.Tokenizer` that minigpt's `Tokenizer` calls.

    Args:
        vocab: token -> id.
        merges: pair of symbols -> its place among the merges.
        files: the content of vocab.txt and bpe.codes.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Mapping[tuple[str, ...], int],
        files: Mapping[str, str],
    ) -> None:
        self.vocab, self.merges, self.files = dict(vocab), merges, files
        self.added: dict[str, AddedToken] = {}
        self.splitter = re.compile("(?!)")  # matches nothing
        self.ids_of_word = lru_cache(2**16)(self._ids_of_word)

    @classmethod
    def read(cls, folder: Path) -> "Phobert":
        """From the two files of a folder.

        Raises:
            ValueError: a line of vocab.txt is not a token and its count.
        """
        files = {name: read_text(folder / name) for name in FILES}
        vocab = {token: i for i, token in enumerate(FIRST)}
        for number, line in enumerate(files["vocab.txt"].removesuffix("\n").split("\n"), 1):
            token, space, _ = line.strip().rpartition(" ")
            if not space:
                raise ValueError(
                    f"vocab.txt, line {number} is {short(line)}, must be a token and its count"
                )
            vocab[token] = len(vocab)
        lines = files["bpe.codes"].split("\n")[:-1]
        merges = {tuple(line.split()[:-1]): rank for rank, line in enumerate(lines)}
        return cls(vocab, merges, files)

    def save(self, folder: Path) -> None:
        """Writes the two files, and tokenizer_config.json, which names transformers' class."""
        for name, content in self.files.items():
            storage.write_text(folder / name, content)
        tokens = {self.vocab[name]: token for name, token in self.added.items()}
        described = {
            str(i): {flag: getattr(token, flag) for flag in FLAGS} for i, token in tokens.items()
        }
        config = {"tokenizer_class": "PhobertTokenizer", "added_tokens_decoder": described}
        storage.write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def add_tokens(self, tokens: Iterable[AddedToken]) -> None:
        """Tokens that are found before a text is cut into words; a new one gets the next id."""
        for token in tokens:
            if token.single_word:
                raise ValueError(
                    f"{short(token.content)}: single_word is not supported, only false"
                )
            self.vocab.setdefault(token.content, len(self.vocab))
            self.added[token.content] = token
        longest_first = sorted(self.added, key=len, reverse=True)
        self.splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str) -> list[int]:
        parts = self.splitter.split(text)  # text, token, text, ..., text
        for i in range(1, len(parts), 2):
            token = self.added[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip() if token.lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if token.rstrip else parts[i + 1]
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.vocab[part])
            else:
                for word in WORD.findall(part):
                    ids += self.ids_of_word(word)
        return ids

    def _ids_of_word(self, word: str) -> tuple[int, ...]:
        unknown = self.vocab[UNKNOWN]
        return tuple(self.vocab.get(piece, unknown) for piece in self.pieces(word))

    def pieces(self, word: str) -> list[str]:
        """`"thường"` -> `["th@@", "ường"]`

        The pairs that have a merge wait in a heap, so that a word of n characters takes n log n.
        """
        symbols = [*word[:-1], word[-1] + END]  # one that was joined to that before it is ""
        n = len(symbols)
        before, after = [*range(-1, n - 1)], [*range(1, n + 1)]
        waiting: list[tuple[int, int]] = []  # (place of the merge, index of the left symbol)

        def rank(i: int) -> int | None:
            j = after[i]
            return self.merges.get((symbols[i], symbols[j])) if symbols[i] and j < n else None

        def wait(i: int) -> None:
            if i >= 0 and (place := rank(i)) is not None:
                heappush(waiting, (place, i))

        for i in range(n):
            wait(i)
        while waiting:
            place = waiting[0][0]
            touched = []
            while waiting and waiting[0][0] == place:  # wherever it stands, from the left
                _, i = heappop(waiting)
                if rank(i) == place:
                    j = after[i]
                    symbols[i], symbols[j], after[i] = symbols[i] + symbols[j], "", after[j]
                    if after[i] < n:
                        before[after[i]] = i
                    touched += [before[i], i]
            for i in touched:
                wait(i)
        kept = [symbol for symbol in symbols if symbol]
        return [symbol + JOIN for symbol in kept[:-1]] + [kept[-1].removesuffix(END)]

    def decode(self, ids: Iterable[int]) -> str:
        tokens = {i: token for token, i in self.vocab.items()}
        text = " ".join(tokens.get(i, UNKNOWN) for i in ids)
        return text.replace(f"{JOIN} ", "").strip()

    def token_to_id(self, token: str) -> int | None:
        return self.vocab.get(token)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        return dict(self.vocab)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {self.vocab[content]: token for content, token in self.added.items()}
