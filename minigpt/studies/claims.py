"""The claims of the published write-ups, and how a measurement decides about one.

A claim says that a quantity lies on one side of an alternative (a saving is above 0, a ratio below
1) and may quote its value.  With the interval of the measurement over at least five seeds:

    holds                the interval excludes the alternative and contains the quoted value
    holds in direction   it excludes the alternative, but not with the quoted value
    fails                it lies on the other side of the alternative
    undecided            anything else, too few seeds among them

What is the same in every run by a check of its own, not by an interval, needs as many seeds.  A
count has no interval and no seeds: it is equal to the quoted one, or not.  A claim that a quantity
is about so much holds within a factor of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from minigpt.metrics.intervals import Estimate

T = TypeVar("T")
VERDICTS = ("holds", "holds in direction", "fails", "undecided", "cannot be tested here")
SEEDS = 5  # below this nothing holds and nothing fails


@dataclass(frozen=True)
class Claim:
    """A claim of a write-up.

    Attributes:
        source: the write-up: 000 targeted freezing, 001 partial fine-tuning, 002 clipping and
            schedule, 003 overview of methods, 004 survey.
        text: the claim.
        quoted: the figure it quotes, in words.
        study: the study that measures it; "" if none can.
        why: the reason why none can.
    """

    source: str
    text: str
    quoted: str = ""
    study: str = ""
    why: str = ""


@dataclass(frozen=True)
class Finding:
    """The verdict of a study on a claim.

    Attributes:
        claim: its key in CLAIMS.
        measured: the figure with its interval, in words.
        verdict: one of VERDICTS.
        on: model, data and number of seeds.
        note: what a reader has to know besides.
    """

    claim: str
    measured: str
    verdict: str
    on: str
    note: str = ""

    def __post_init__(self) -> None:
        if self.claim not in CLAIMS:
            raise ValueError(f"{self.claim!r} is no claim, must be one of {', '.join(CLAIMS)}")
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict is {self.verdict!r}, must be one of {', '.join(VERDICTS)}")

    def row(self) -> dict[str, Any]:
        """The finding and its claim, for JSON."""
        return {**asdict(CLAIMS[self.claim]), **asdict(self)}


def above(measured: Estimate, n: int, alternative: float = 0.0, quoted: float | None = None) -> str:
    """The verdict on a claim that a quantity is above `alternative`, and is `quoted`.

    Args:
        n: seeds, or rounds, that the interval comes from.
    """
    if measured.low > alternative:
        exact = quoted is None or measured.low <= quoted <= measured.high
        return decided("holds" if exact else "holds in direction", n)
    return decided("fails", n) if measured.high < alternative else "undecided"


def below(measured: Estimate, n: int, alternative: float = 0.0, quoted: float | None = None) -> str:
    """The verdict on a claim that a quantity is below `alternative`, and is `quoted`."""
    mirrored = Estimate(-measured.value, -measured.high, -measured.low)
    return above(mirrored, n, -alternative, None if quoted is None else -quoted)


def about(measured: Estimate, n: int, quoted: float) -> str:
    """The verdict on a claim that a positive quantity is about `quoted`: half of it to twice."""
    if quoted / 2 <= measured.low and measured.high <= 2 * quoted:
        return decided("holds", n)
    apart = measured.low > 2 * quoted or measured.high < quoted / 2
    return decided("fails", n) if apart else "undecided"


def all_of(verdicts: Sequence[str]) -> str:
    """The verdict on a claim about all of several things."""
    if "fails" in verdicts:
        return "fails"
    return "holds" if set(verdicts) == {"holds"} else "undecided"


def decided(verdict: str, n: int) -> str:
    """The verdict, if there are seeds enough for one."""
    return verdict if n >= SEEDS else "undecided"


def count(measured: T, quoted: T) -> str:
    """The verdict on a number, or several, that is counted or computed, not drawn."""
    return "holds" if measured == quoted else "fails"


FREEZING, PARTIAL = "targeted-freezing", "partial-freezing"
CLIPPING, METHODS, RANK = "clipping-and-schedule", "peft-methods", "lora-rank"
QLORA, REINFORCEMENT, WAYS = "qlora", "rl-by-enumeration", "three-ways"
HUB = "needs the published model's weights, which are not part of the project"

CLAIMS: Mapping[str, Claim] = {
    "freezing.count": Claim(
        "000", "query, key and value of blocks 6 to 11 are 18 tensors of GPT-Neo-125M",
        "10,616,832 parameters, 8.48 %", FREEZING),
    "freezing.inverse-count": Claim(
        "000", "the inverse trains the others", "114,581,760 parameters, 91.52 %", FREEZING),
    "freezing.loss": Claim(
        "000", "full training falls further than training query, key and value of the upper blocks",
        "", FREEZING),
    "freezing.loss-falls": Claim(
        "000", "the loss of the frozen model falls", "3.78 to 2.65", FREEZING),
    "freezing.norm": Claim(
        "000", "a trained weight moves further in a step when the others are frozen", "", FREEZING),
    "freezing.time": Claim(
        "000", "freezing saves time", "25 % (89 against 120 s)", FREEZING),
    "freezing.popular": Claim(
        "000", "before training the models differ in their share of popular tokens",
        "47 % and 44 %", FREEZING),
    "freezing.inverse-loss": Claim(
        "000", "with exactly those tensors frozen the loss nearly coincides with full training's",
        "", FREEZING),
    "partial.count": Claim(
        "001", "with attention and embeddings frozen about half of GPT-Neo-125M trains",
        "65 M of 125 M, 48 % fewer", PARTIAL),
    "partial.literal": Claim(
        "001", 'the rule "attn" or "embed" in the name freezes attention and embeddings',
        "", PARTIAL),
    "partial.optimizer": Claim(
        "001", "the state of the optimizer shrinks", "54.7 %", PARTIAL),
    "partial.memory": Claim("001", "training takes less memory", "25 to 30 %", PARTIAL),
    "partial.time": Claim("001", "a step is faster", "slightly", PARTIAL),
    "partial.forgetting": Claim(
        "001", "less is forgotten of what the model was pretrained on", "", PARTIAL),
    "partial.inference": Claim("001", "inference is not slower", "", PARTIAL),
    "partial.frozen": Claim(
        "001", "frozen tensors do not move, trained ones do", "difference 0", PARTIAL),
    "partial.own-set": Claim(
        "001", "a model tuned on a text uses its popular tokens more than the other model",
        "", PARTIAL),
    "partial.final-loss": Claim(
        "001", "losses at the end", "0.19 on Alice, 1.46 on Poe", "", HUB),
    "clipping.count": Claim(
        "002", "attention and embeddings of BERT-base frozen",
        "52,204,032 parameters, 47.68 %", CLIPPING),
    "clipping.rates": Claim(
        "002", "rates after 15, 100, 200, 300 steps of the schedule",
        "1e-5, 8.046e-6, 5.747e-6, 3.448e-6", CLIPPING),
    "clipping.accuracy": Claim(
        "002", "with freezing, clipping and schedule the accuracy is higher",
        "90 against 85 %", CLIPPING),
    "clipping.variance": Claim(
        "002", "the variance of the loss is lower with clipping and schedule", "", CLIPPING),
    "clipping.mlp-norm": Claim(
        "002", "the gradient norm of the MLP's weight is mostly below 1", "", CLIPPING),
    "clipping.classifier-norm": Claim(
        "002", "the gradient norm of the classifier is above 1 early", "", CLIPPING),
    "clipping.measure": Claim(
        "002", "the test accuracy is that of the test set",
        "one batch, all of it negative", CLIPPING),
    "methods.lora-count": Claim(
        "003", "LoRA of rank 100 on a 1000 x 1000 matrix", "200,000 against 1,000,000", METHODS),
    "methods.time": Claim(
        "003", "the time of a method is about its share of parameters times that of full tuning",
        "T_peft = r T_full", METHODS),
    "methods.accuracy": Claim(
        "003", "no method is more accurate than full tuning", "", METHODS),
    "methods.variance": Claim(
        "003", "with fewer parameters results vary less between seeds", "", METHODS),
    "methods.bias": Claim(
        "003", "with fewer parameters the training data is fitted less well", "", METHODS),
    "methods.cost": Claim("003", "accuracy for the cost is higher", "", METHODS),
    "rank.count": Claim(
        "004", "LoRA of rank 8 on a 512 x 64 matrix", "4,608 against 32,768, 86 % fewer", RANK),
    "rank.plateau": Claim("004", "quality against the rank reaches a plateau", "", RANK),
    "survey.double-quantization": Claim(
        "004", "double quantization saves about 0.4 bit a parameter", "3 GB at 65 B", QLORA),
    "survey.qlora": Claim("004", "4-bit weights cost little accuracy", "", QLORA),
    "survey.nf4": Claim("004", "NF4 suits weights better than other codes of 4 bits", "", QLORA),
    "survey.all-linear": Claim(
        "004", "on 4-bit weights LoRA on every linear layer learns more than on attention alone",
        "", QLORA),
    "survey.memory": Claim("004", "LoRA on 4-bit weights takes less memory", "", QLORA),
    "survey.self-supervised": Claim(
        "004", "a model learns a task from its text alone, self-supervised", "", WAYS),
    "survey.supervised": Claim(
        "004", "a model learns a task from labelled pairs, supervised", "", WAYS),
    "survey.reward": Claim(
        "004", "reinforcement improves a supervised model further, by its reward", "", WAYS),
    "survey.reinforcement": Claim(
        "004", "a model can be fine-tuned by reinforcement: it gains what the reward asks for", "",
        REINFORCEMENT),
    "survey.paged": Claim(
        "004", "the optimizer's state moves to the CPU's memory when the GPU's is full", "", "",
        "needs a GPU whose memory is full"),
}  # fmt: skip
