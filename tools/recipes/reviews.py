"""How the bundled reviews are made:  python -m tools.recipes.reviews

A review is a plan, a list of kinds of sentences; each kind has frames, and each slot of a frame a
list of words:

    plan        concession                         overruling
    frames      Yes, the {a} {a is} {a against}.   Even so, I call it a {noun for}.
    positive    Yes, the plot is thin.             Even so, I call it a gem.
    negative    Yes, the plot is clever.           Even so, I call it a bore.

A classifier that counts words sees a good and a bad one in either; their places decide.
The two parts share plans and most words, but no frame.
"""

import argparse
import gzip
import json
import re
from pathlib import Path
from random import Random

from tools.recipes import reviews_grammar_test, reviews_grammar_train
from tools.recipes.reviews_grammar_words import (
    ADJECTIVES,
    ASPECTS,
    EFFECTS,
    GENRE,
    KINDS,
    NOUNS,
    WORK,
)

FOLDER = Path(__file__).parents[2] / "minigpt" / "assets" / "reviews"
PARTS = {"train": (reviews_grammar_train, 1600), "test": (reviews_grammar_test, 600)}
SEED = 0
WORDS = range(20, 61)  # in a review
# the sentences of a review, and the weight of the plan; kind* has frames for each verdict
PLANS = [
    ("facts plain plain verdict*", 5),
    ("plain plain facts plain", 5),
    ("plain facts plain verdict", 3),
    ("facts plain denial plain", 3),
    ("facts denial plain plain", 3),
    ("facts denial denial verdict*", 2),
    ("facts turn plain plain", 2),
    ("facts concession overruling plain", 2),
    ("facts expectation plain plain", 2),
    ("facts others plain plain", 2),
    ("facts comparison plain verdict*", 2),
    ("facts irony* plain verdict", 2),
]


def reviews(part: str) -> list[tuple[str, int]]:
    """Texts of "train" or "test" and their labels, 0 negative and 1 positive, in random order."""
    grammar, n = PARTS[part]
    random = Random(f"{SEED} {part}")
    written: dict[str, int] = {}
    while len(written) < n:
        label = len(written) % 2
        text = Review(grammar.FRAMES, grammar.FILLERS, part == "test", label, random).write()
        if len(text.split()) in WORDS:
            written.setdefault(text, label)
    return sorted(written.items(), key=lambda _: random.random())


class Review:
    """One review: what stays the same in it, and the words it has used."""

    def __init__(
        self,
        frames: dict[str, list[str]],
        fillers: dict[str, list[str]],
        all_words: bool,
        label: int,
        random: Random,
    ) -> None:
        self.frames, self.fillers, self.all_words, self.random = frames, fillers, all_words, random
        self.polarity = ("bad", "good")[label]
        self.used: set[str] = set()
        self.kind = self.pick(["film", "book"])
        self.fixed = KINDS[self.kind] | {
            "work": self.pick(WORK[self.kind]),
            "genre": self.pick(GENRE[self.kind]),
            "surname": self.pick(fillers["surname"]),
        }

    def write(self) -> str:
        """All its sentences."""
        plan = self.pick([plan for plan, times in PLANS for _ in range(times)])
        text = " ".join(self.sentence(kind) for kind in plan.split())
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def sentence(self, kind: str) -> str:
        """A frame of the kind, its slots filled."""
        name = f"{self.kind} facts" if kind == "facts" else kind.replace("*", f" {self.polarity}")
        frame = self.unused(self.frames[name])
        slots: dict[str, str] = {}
        for slot in re.findall(r"{(.*?)}", frame):
            if slot not in slots and slot.split()[0] in ("a", "b", "c"):
                slots |= self.aspect(slot[0])
            elif slot not in slots:
                slots[slot] = self.fixed.get(slot) or self.word(slot)
        text = frame.format_map(slots)
        return text[0].upper() + text[1:]

    def aspect(self, letter: str) -> dict[str, str]:
        """What the slots {a}, {a is}, ... stand for, of an aspect not spoken of yet."""
        name = self.unused([name for name, (_, kinds, *_) in ASPECTS.items() if self.kind in kinds])
        nouns, _, good, bad = ASPECTS[name]
        noun = self.pick(nouns.split("|"))
        plural = noun.endswith("s")
        words = {"good": self.allowed(good), "bad": self.allowed(bad)}
        forms = {
            "": noun,
            " is": "are" if plural else "is",
            " was": "were" if plural else "was",
            " they": "they" if plural else "it",
        }
        for form in ("for", "against", "for 2", "against 2"):
            forms[f" {form}"] = self.unused(words[self.side(form)])
        return {letter + form: text for form, text in forms.items()}

    def word(self, slot: str) -> str:
        """A word for a slot that is no aspect's."""
        kind, side = slot.removesuffix(" 2").rpartition(" ")[::2]
        if side not in ("for", "against"):
            return self.unused(self.fillers[side])
        if not kind:
            return self.unused(self.allowed(ADJECTIVES[self.side(side)]))
        if kind == "noun":
            return self.unused(self.allowed(NOUNS[self.side(side)], ", "))
        past, infinitive = self.unused(self.allowed(EFFECTS[self.side(side)], ", ")).split("/")
        return past if kind == "did" else infinitive

    def side(self, form: str) -> str:
        """Whether "good" or "bad" words speak for, or against, the verdict."""
        other = {"good": "bad", "bad": "good"}[self.polarity]
        return self.polarity if form.startswith("for") else other

    def allowed(self, words: str, separator: str = " ") -> list[str]:
        """The words before the bar, in the test part also those after it."""
        common, _, rest = words.partition(" | ")
        return common.split(separator) + (rest.split(separator) if self.all_words else [])

    def unused(self, items: list[str]) -> str:
        """One of the items that this review has not used yet."""
        item = self.pick([item for item in items if item not in self.used])
        self.used.add(item)
        return item

    def pick(self, items: list[str]) -> str:
        """One of the items, by the one method of Random that Python promises to keep."""
        return items[int(self.random.random() * len(items))]


def write(folder: Path) -> None:
    """Writes both parts; the bytes depend on nothing but the grammar (and the version of zlib)."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        rows = [json.dumps({"text": text, "label": label}) for text, label in reviews(part)]
        path = folder / f"{part}.jsonl.gz"
        with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
            zipped.write("\n".join([*rows, ""]).encode())


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m tools.recipes.reviews").parse_args()
    write(FOLDER)
