"""Damaged adapter files: each loads or is a ValueError of one line, soon, and the model stays.

python -m tests.peft_lite.test_fuzz_adapters TRIES SEED      counts the outcomes
"""

import json
import logging
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_lite
from peft_lite import BottleneckConfig, FreezeConfig, IA3Config, LoraConfig, PrefixConfig
from tests.peft_lite.peft_methods import fresh
from tests.peft_lite.peft_models import Picture

SECONDS, MEMORY = 15, 2**31
SEEDS: dict[str, tuple[str, Any]] = {
    "lora": (
        "bert",
        LoraConfig(["query", "mlp.up"], r=3, bias="all", modules_to_save=["classifier"]),
    ),
    "patterns": ("gpt-neo", LoraConfig(["q_proj", "wte"], r=3, rank_pattern={"wte": 2})),
    "ia3": ("gpt-neo", IA3Config(["k_proj", "c_proj"], ["c_proj"])),
    "prefix": ("gpt-neo", PrefixConfig(3, form="peft")),
    "bottleneck": ("gpt-neo", BottleneckConfig("pfeiffer", 3)),
    "freezing": ("gpt-neo", FreezeConfig(train=["ln_1"])),
}
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2.0,
        0.5,
        5_000_000,
        10**18,
        10**30,
        1e39,
        1e308,
        "",
        "\x1b[2J",
    ),
    *(
        "all-linear",
        "(a+)+$",
        r"([a-z_.]+)+\d$",
        "[",
        "(?P<a>",
        "a{9999999999}",
        "q_proj",
        "é\ud800",
    ),
    *([], [None], ["q_proj"], ["q_proj"] * 500, [[]], [3], {}, {"a": 1}, {"q_proj": 10**9}),
    *({"(a|a)*$": 3}, {"": 2}, {"q_proj": None}, {"q_proj": "3"}, "x" * 5000),
)
FIELDS = [
    *("r", "lora_alpha", "lora_dropout", "target_modules", "feedforward_modules", "rank_pattern"),
    *("alpha_pattern", "bias", "modules_to_save", "layers_to_transform", "use_dora", "use_rslora"),
    *("peft_type", "num_virtual_tokens", "token_dim", "num_layers", "init_lora_weights", "train"),
    *("freeze", "placement", "non_linearity", "\x1b[31m"),
]
NAMES = ("", "\x1b[31mred", "x", "base_model.model.classifier.weight", "a" * 3000, "module.x")
DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64, torch.uint8)


def config_damage(rng: random.Random, text: str) -> bytes:
    """One or two damages of the config: of fields, or of bytes."""
    raw = json.loads(text)
    for _ in range(rng.randint(1, 2)):
        field = rng.choice([*raw, *FIELDS])
        if rng.random() < 0.2:
            raw.pop(field, None)
        else:
            raw[field] = rng.choice(VALUES)
    data = json.dumps(raw).encode()
    kind = rng.randrange(8)
    if kind == 0:
        return bytes_damage(rng, data)
    if kind == 1:
        word = rng.choice((b"NaN", b"Infinity", b"-1e999", b"[" * 9000, b'{"r": 1, "r": 2}'))
        return data.replace(b"3", word, 1)
    return data


def tensor_damage(rng: random.Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = rng.choice(sorted(tensors))
    t, kind = tensors[name], rng.randrange(10)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(NAMES)] = t.clone()
    elif kind == 2:
        tensors[name] = t.to(rng.choice(DTYPES))
    elif kind == 3:
        tensors[name] = torch.zeros(
            [rng.choice((0, 1, 3, 24, 4000)) for _ in range(rng.randint(0, 3))]
        )
    elif kind == 4:
        t.view(-1)[0] = rng.choice((torch.nan, torch.inf, -torch.inf))
    elif kind == 5:
        tensors[name] = torch.full(t.shape, 1e300, dtype=torch.float64)
    elif kind == 6:
        tensors[name.replace("base_model.model.", "base_model.model._orig_mod.")] = tensors.pop(
            name
        )
    elif kind == 7:
        tensors[f"{name.rpartition('.')[0]}.base_layer.weight"] = t.clone()
    elif kind == 8:
        tensors[f"module.{name}"] = tensors.pop(name)
    return tensors


def bytes_damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut or put in, mostly near the beginning, where headers are."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not damaged:
            break
        place = rng.randrange(min(len(damaged), rng.choice((8, 300, len(damaged)))))
        kind = rng.randrange(4)
        if kind == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[place:]
        elif kind == 2:
            damaged[place:place] = rng.randbytes(rng.randint(1, 20))
        else:
            del damaged[place : place + rng.randint(1, 20)]
    return bytes(damaged)


def damage(rng: random.Random, good: Path, bad: Path) -> None:
    """A damaged copy of an adapter: of its config, of its tensors, or of both."""
    bad.mkdir()
    text = (good / "adapter_config.json").read_text()
    tensors = load_file(good / "adapter_model.safetensors")
    which = rng.randrange(3)
    config = config_damage(rng, text) if which != 1 else text.encode()
    if which != 0:
        tensors = tensor_damage(rng, tensors)
    file = bad / "adapter_model.safetensors"
    if rng.random() < 0.3:
        file = bad / "adapter_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    else:
        save_file(tensors, file)
    if which != 0 and rng.random() < 0.5:
        file.write_bytes(bytes_damage(rng, file.read_bytes()))
    (bad / "adapter_config.json").write_bytes(config)


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory(limit: int) -> Iterator[None]:
    """At most this much address space more than now."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(model: nn.Module, folder: Path) -> str:
    """`loads`, `refused`, or what is wrong."""
    before, silent = Picture(model), ""
    try:
        with alarm(SECONDS), memory(MEMORY):
            handle = peft_lite.load(model, folder)
    except ValueError as error:
        message = str(error)
        if "\n" in message or not message.isprintable() or "weights_only" in message:
            return f"message {message[:80]!r}"
        return "refused" if Picture(model) == before else "refused, but the model changed"
    except BaseException as error:
        return f"{type(error).__name__} {str(error)[:60]}"
    if not all(t.isfinite().all() for t in handle.state().values()):
        silent = "NaN loaded"
    handle.detach()
    return silent or "loads"


def run(directory: Path, names: tuple[str, ...], tries: int, seed: int) -> Counter[str]:
    """The outcomes of so many damaged files of each adapter."""
    rng, outcomes = random.Random(seed), Counter[str]()
    for name in names:
        kind, config = SEEDS[name]
        torch.manual_seed(seed)
        peft_lite.attach(fresh(kind), config).save(directory / name)
        model = fresh(kind)
        for i in range(tries):
            bad = directory / f"{name}-{i}"
            damage(rng, directory / name, bad)
            result = outcome(model, bad)
            outcomes[result] += 1
            if result not in ("loads", "refused"):
                print(result, bad, file=sys.stderr)
                model = fresh(kind)
    return outcomes


@pytest.mark.skipif(sys.platform != "linux", reason="bounds of time and memory are Linux's")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SEEDS)
def test_damaged_adapters_load_or_are_refused(name: str, tmp_path: Path) -> None:
    outcomes = run(tmp_path, (name,), 60, 0)
    assert outcomes.keys() == {"loads", "refused"}
    assert min(outcomes.values()) > 2


if __name__ == "__main__":  # TRIES SEED
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), tuple(SEEDS), int(sys.argv[1]), int(sys.argv[2])))
