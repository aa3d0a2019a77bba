"""Damages every kind of file that a checkpoint holds, and opens what is left.

    python -m tests.fuzz --seconds 600

A damaged checkpoint loads, and then its weights and logits are finite, or it is refused by a
ValueError of one printable line that names a file.  Anything else is a fault: another exception,
ten seconds, 300 MB, or a control character on the terminal.  A case is a number: the same number
damages the same file in the same way.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import minigpt
from minigpt import Bert, BertConfig, GPTNeo, GPTNeoConfig, Tokenizer
from minigpt.data.chat import ChatTemplate
from minigpt.models.roberta import Roberta, RobertaConfig

SECONDS, BYTES = 10, 300 * 2**20  # what one case may take
DEEP = "[" * 100_000 + "]" * 100_000
TEXT = "The quick brown fox jumps over the lazy dog; it is said that dogs sleep. " * 4
TEMPLATE = """\
{% set past = namespace(role="none") %}
{% for message in messages %}
{% if message.role == past.role %}{{ raise_exception("roles must take turns") }}{% endif %}
{{ "<" + message["role"] + ">" }}{{ message["content"] | trim }}{{ eos_token }}
{% set past.role = message.role %}
{% endfor %}
{% if add_generation_prompt %}{{ "<assistant>" * 1 }}{% endif %}
"""
TALK = [{"role": "user", "content": " What is it? "}, {"role": "assistant", "content": "A fox."}]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1000, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30),
    0.5, 1.0, -0.5, 2.5, 1e-300, 1e38, 1e308, math.nan, math.inf, -math.inf,
    "", "1", "gelu", "local", "\x1b[31mred", "\x00", "two\nlines", "../up", "{}", "\ud800",
    "x" * 10**5, [], {}, [[]], [None], {"a": {}}, [1, [2, [3]]], ["global"] * 3, "@deep",
]  # fmt: skip


# ---- the checkpoints that are damaged -----------------------------------------------------------


def checkpoints(root: Path) -> dict[str, tuple[Path, str]]:
    """Small whole checkpoints: what is damaged -> (its folder, the file)."""
    torch.manual_seed(0)
    decoder = root / "decoder"
    config = GPTNeoConfig(300, 32, 16, 2, 4, None, None, window_size=4)
    minigpt.save(GPTNeo(config), decoder)
    bpe = Tokenizer.train([TEXT], 300)
    bpe.save(decoder)
    encoder = root / "encoder"
    minigpt.save(Bert(BertConfig(120, 32, 2, 16, 2, 4, 32), "classification", 3), encoder)
    pieces = Tokenizer.train_word_piece([TEXT], 100)
    vocabulary = sorted(pieces.backend.get_vocab().items(), key=lambda item: item[1])
    (encoder / "vocab.txt").write_text("\n".join(token for token, _ in vocabulary) + "\n")
    (encoder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True})
    )
    (encoder / "added_tokens.json").write_text(json.dumps({"[NEW]": len(vocabulary)}))

    old = shutil.copytree(decoder, root / "zip")  # torch's own files, with the older tokenizer's
    (old / "tokenizer.json").unlink()
    model = json.loads(bpe.backend.to_str())["model"]
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tensors = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    torch.save(tensors, old / "pytorch_model.bin")
    older = shutil.copytree(old, root / "pickle")
    torch.save(tensors, older / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    shards = shutil.copytree(decoder, root / "shards")
    (shards / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == shard}, shards / shard)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    four = shutil.copytree(decoder, root / "four-bits")
    minigpt.save(minigpt.load(decoder, quantize="nf4"), four)
    words = root / "phobert"
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    minigpt.save(
        Roberta(RobertaConfig(120, 64, type_vocab_size=1, intermediate_size=32, **sizes)), words
    )
    letters = sorted({*TEXT} - {" "})
    (words / "vocab.txt").write_text("".join(f"{t} 1\n{t}@@ 1\n" for t in [*letters, "dog"]))
    (words / "bpe.codes").write_text("d o 9\ndo g</w> 8\nt h 7\n")
    talk = shutil.copytree(decoder, root / "talk")
    (talk / "chat_template.jinja").write_text(TEMPLATE)
    return {
        "PhoBERT's vocab.txt": (words, "vocab.txt"),
        "PhoBERT's bpe.codes": (words, "bpe.codes"),
        "chat_template.jinja": (talk, "chat_template.jinja"),
        "weights of 4 bits": (four, "model.safetensors"),
        "config.json of 4 bits": (four, "config.json"),
        "decoder's config.json": (decoder, "config.json"),
        "encoder's config.json": (encoder, "config.json"),
        "model.safetensors": (encoder, "model.safetensors"),
        "pytorch_model.bin": (old, "pytorch_model.bin"),
        "older pytorch_model.bin": (older, "pytorch_model.bin"),
        "index": (shards, "model.safetensors.index.json"),
        "shard": (shards, "model-1.safetensors"),
        "tokenizer.json": (decoder, "tokenizer.json"),
        "vocab.json": (old, "vocab.json"),
        "merges.txt": (old, "merges.txt"),
        "vocab.txt": (encoder, "vocab.txt"),
        "tokenizer_config.json": (encoder, "tokenizer_config.json"),
        "added_tokens.json": (encoder, "added_tokens.json"),
    }


# ---- the damage ---------------------------------------------------------------------------------


def damaged(data: bytes, file: str, draw: random.Random) -> bytes:
    """The content of a file with one to three things wrong."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        if draw.random() < 0.3:
            data = flipped(data, draw)
        elif file.endswith(".json"):
            data = other_json(data, draw)
        elif file.endswith(".safetensors"):
            data = other_header(data, draw)
        elif file.endswith(".bin"):
            data = other_pickle(data, draw)
        else:
            lines = data.split(b"\n")
            lines[draw.randrange(len(lines))] = draw.choice(
                (b"", b"a b c", b"\xff\xfe", b"\x1b[31m", b"[UNK]", b"t h", draw.choice(lines))
            )
            data = b"\n".join(lines)
    return data


def flipped(data: bytes, draw: random.Random) -> bytes:
    """A few other bytes, an end cut off, or a piece twice."""
    if not data:
        return b"\x80"
    place = draw.randrange(len(data))
    kind = draw.randrange(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[max(0, place - draw.randrange(64)) :]
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 4))):
        where = draw.randrange(min(len(data), draw.choice((16, 1024, len(data)))))
        out[where] = draw.choice((out[where] ^ 1 << draw.randrange(8), 0, 255, 46, 128))
    return bytes(out)


def other_json(data: bytes, draw: random.Random) -> bytes:
    """A value of another kind, a key gone, renamed or twice, at any depth."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return flipped(data, draw)
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.8:
        holder = holder[key]
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    value = holder[key]
    kind = draw.choice(("value", "value", "scaled", "gone", "renamed", "twice"))
    if kind == "scaled" and isinstance(value, int | float):
        holder[key] = value * draw.choice((-1, 2, 1000, 10**9, 0.5))
    elif kind == "gone" and holder is not root:
        del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        del holder[key]
        holder[draw.choice((key + "s", key.upper(), "\x1b[31m", "{}", key[1:]))] = value
    elif kind == "twice" and isinstance(holder, dict):
        holder["@twice"] = draw.choice((value, draw.choice(VALUES)))
    else:
        holder[key] = draw.choice(VALUES)
    text = json.dumps(root[0]).replace('"@twice"', json.dumps(key))
    return text.replace('"@deep"', DEEP).encode()


def other_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header says something else of the same bytes."""
    try:
        size = struct.unpack("<Q", data[:8])[0]
        header = other_json(data[8 : 8 + size], draw)
    except struct.error:
        return flipped(data, draw)
    if draw.random() < 0.2:
        return struct.pack("<Q", draw.choice((0, size + 1, 2**30, 2**63))) + header
    dtype = draw.choice((b'"F32"', b'"F32"', b'"I32"', b'"F64"', b'"C64"', b'"BF16"', b'"F4"'))
    header = header.replace(b'"F32"', dtype, draw.choice((1, -1)))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def other_pickle(data: bytes, draw: random.Random) -> bytes:
    """A zip whose pickle is damaged while its check sums are right; an older file's bytes."""
    path = Path(tempfile.mkstemp(suffix=".zip")[1])
    try:
        path.write_bytes(data)
        with zipfile.ZipFile(path) as source:
            content = {name: source.read(name) for name in source.namelist()}
        name = draw.choice([*content, *(n for n in content if n.endswith(".pkl"))])
        content[name] = flipped(content[name], draw)
        with zipfile.ZipFile(path, "w", draw.choice((0, 0, 8))) as target:
            for name, piece in content.items():
                target.writestr(name, piece)
        return path.read_bytes()
    except Exception:  # no zip, or none any more
        return flipped(data, draw)
    finally:
        path.unlink()


# ---- the opening --------------------------------------------------------------------------------


@torch.no_grad()
def opened(folder: Path) -> None:
    """Loads a checkpoint as a user does; raises AssertionError where it is not right."""
    tokenizer = Tokenizer.load(folder)
    if (folder / "chat_template.jinja").exists():
        tokenizer.encode(ChatTemplate.load(folder).text(TALK, add_generation_prompt=True))
    model = minigpt.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        return
    ids = tokenizer.encode(TEXT)[: model.max_tokens] or [0]
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.numel())]
    assert all(t.isfinite().all() for t in tensors), "weights that are not finite"
    largest = max(float(t.abs().max()) for t in tensors if t.is_floating_point())
    logits = model(torch.tensor([ids]))
    assert largest > 100 or logits.isfinite().all(), "logits that are not finite"


def outcome(folder: Path) -> str:
    """`loads`, `refused`, or what is wrong."""
    try:
        opened(folder)
    except ValueError as error:
        text = str(error)
        if not text.isprintable() or len(text) > 1000:
            return f"a message that is no short printable line: {text[:300]!r}"
        names = [str(folder), "the chat template fails", *(file.name for file in folder.iterdir())]
        if not any(name in text for name in names):
            return f"a message that names no file: {text}"
        return "refused"
    except BaseException as error:
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = Path(place.tb_frame.f_code.co_filename).name if place else ""
        return f"{type(error).__name__}: {str(error)[:200]!r} in {where}"
    return "loads"


def cases(seeds: range) -> Iterator[tuple[int, str, str]]:
    """(number, file, outcome) of every case, in processes that may die of one."""
    with tempfile.TemporaryDirectory() as name:
        sources = checkpoints(Path(name) / "whole")
        kinds = list(sources)
        while seeds:
            for text in apart(seeds, sources, Path(name)):
                yield seeds[0], kinds[seeds[0] % len(kinds)], text
                seeds = seeds[1:]


def apart(seeds: range, sources: dict[str, tuple[Path, str]], root: Path) -> Iterator[str]:
    """The outcomes of the cases up to the first that kills the process, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            for descriptor in (1, 2):
                os.dup2(
                    os.open(root / "printed", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor
                )
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 4 * BYTES,) * 2)
            for seed in seeds:
                kind = list(sources)[seed % len(sources)]
                os.write(writing, json.dumps(case(seed, *sources[kind], root)).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe:
            yield from map(json.loads, pipe)
        _, status = os.waitpid(child, 0)
        child = 0
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            yield f"{SECONDS} seconds" if number == signal.SIGALRM else f"signal {number}"
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def case(seed: int, source: Path, file: str, root: Path) -> str:
    """Opens one damaged checkpoint, with an eye on time, memory and the terminal."""
    folder, printed = root / "damaged", root / "printed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    content = damaged((source / file).read_bytes(), file, random.Random(seed))
    (folder / file).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)  # nobody handles it: it ends the process, in a library's loop too
    text = outcome(folder)
    signal.alarm(0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > BYTES:
        text = f"{grown // 2**20} MB, then: {text}"
    output = printed.read_text(errors="replace")
    os.truncate(printed, 0)
    if "panicked" in output or not output.replace("\n", "").isprintable():
        text = f"prints {output[:200]!r}, then: {text}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + options.seconds
    counts: Counter[tuple[str, str]] = Counter()
    for seed, kind, result in cases(range(options.start, 10**9)):
        known = result if result in ("loads", "refused") else "fault"
        counts[kind, known] += 1
        if known == "fault":
            print(f"{seed} {kind}: {result}")
        if time.monotonic() > end:
            break
    for kind in sorted({kind for kind, _ in counts}):
        row = "  ".join(f"{counts[kind, k]:6} {k}" for k in ("loads", "refused", "fault"))
        print(f"{kind:26}{row}")


if __name__ == "__main__":
    main()
