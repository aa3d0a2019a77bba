"""The kinds of tokenizer files against the libraries' own reading of them, on real texts."""

import json
from collections.abc import Callable

import pytest
import tokenizers
import transformers

from minigpt import Tokenizer
from minigpt.data.tokenizer import Special
from tests.conftest import minilm_folder, real_data

ODD = [
    "",
    " ",
    "Hello world",
    "  two  spaces\n\n\ttab\r\n",
    "naïve café, Ångström; İstanbul ß",
    "日本語と한국어, 🤖👩‍👩‍👧 and \u200d\ufeff",
    "don't, we'll; 3.14159 -- 1,000,000!!! (e.g. [CLS] and [MASK])",
    "one<|endoftext|>two <|endoftext|> three",
    "x" * 300,
    "a\u0301e\u0300 \x00\x07 control",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Pieces of two real texts, one of them longer than any model's context, and odd ones."""
    alice = real_data("texts", "alice.txt").read_text(encoding="utf-8")
    stories = real_data("texts", "tinystories.txt").read_text(encoding="utf-8")
    return [*ODD, alice[:40_000], alice[70_000:70_333], *stories[:20_000].split("\n")]


@pytest.fixture(scope="module")
def gpt2():
    return real_data("tokenizers", "gpt_neo_125m")


@pytest.fixture(scope="module")
def bert():
    return real_data("tokenizers", "bert_base_uncased")


@pytest.fixture
def bpe_files(gpt2, tmp_path):
    """`vocab.json` and `merges.txt` as GPT-2 was published, from tokenizer.json."""
    model = json.loads((gpt2 / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *pairs]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def vocab_file(bert, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((bert / "vocab.txt").read_bytes())
    return tmp_path


@pytest.fixture
def roberta_files(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        content = real_data("tokenizers", "roberta_base", name).read_bytes()
        (tmp_path / name).write_bytes(content)
    return tmp_path


def oracle(folder) -> transformers.PreTrainedTokenizerFast:
    """Transformers' reading, which neither cuts nor fills unless asked to."""
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def assert_same_ids(ours: Tokenizer, folder, texts: list[str]) -> None:
    theirs = oracle(folder)
    for text in texts:
        expected = theirs(text, add_special_tokens=False, truncation=False, padding=False)
        assert ours.encode(text) == expected["input_ids"], text[:60]


def test_tokenizer_json_of_gpt2(gpt2, texts):
    ours = Tokenizer.load(gpt2)
    assert ours.encode("Hello world") == [15496, 995]
    assert ours.vocab_size == 50257
    assert ours.end_of_text == 50256
    assert_same_ids(ours, gpt2, texts)


def test_vocab_and_merges_equal_tokenizer_json(gpt2, bpe_files, texts):
    ours = Tokenizer.load(bpe_files)
    assert ours.vocab_size == 50257
    assert ours.end_of_text == 50256
    assert ours.encode("one<|endoftext|>two").count(50256) == 1
    assert_same_ids(ours, gpt2, texts)


def test_tokenizer_json_of_bert_neither_cuts_nor_fills(bert, texts):
    """Its file asks for 256 ids whatever the text; a text has as many tokens as it has."""
    assert json.loads((bert / "tokenizer.json").read_text(encoding="utf-8"))["padding"]
    ours = Tokenizer.load(bert)
    assert ours.encode("Hello world") == [7592, 2088]
    assert len(ours.encode("hello " * 1000)) == 1000
    assert_same_ids(ours, bert, texts)


@pytest.mark.parametrize(
    ("folder", "marks"), [("tinyllama", 1), ("mistral_v1", None)], ids=lambda value: str(value)
)
def test_byte_fallback(texts, folder, marks):
    """BPE that SentencePiece learned: an unknown character is its bytes."""
    source = real_data("tokenizers", folder)
    ours, theirs = Tokenizer.load(source), oracle(source)
    odd = [f"{a}{b}{a}" for a in ODD for b in ("<s>", "<0x0A>", "▁", "\u0301", "🤖 ", "</s>\n")]
    for text in [*texts, *odd]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text[:60]
        assert ours.decode(ids) == theirs.decode(ids), text[:60]
    assert ours.encode("\ue000")[-1] == ours.backend.token_to_id("<0x80>")
    golden = real_data("tokenizers", "golden")
    french = json.loads((golden / "llama_encoded.json").read_text(encoding="utf-8"))
    assert ours.decode(ours.encode(french["text"])) == french["text"]
    if marks is not None:  # the vocabulary is Llama 2's
        assert ours.encode(french["text"]) == french["token_ids"][marks:]
        cases = json.loads((golden / "tokenizer_tests.json").read_text(encoding="utf-8"))
        for case in cases["coreml-projects/Llama-2-7b-chat-coreml"]:
            ids = case["encoded"]["input_ids"]
            assert ours.encode(case["input"]) == ids[marks:], case["input"]
            assert ours.decode(ids) == case["decoded_with_special"]


def test_vocab_txt_equals_tokenizer_json(bert, vocab_file, texts):
    ours = Tokenizer.load(vocab_file)
    assert ours.vocab_size == 30522
    assert ours.end_of_text == 102
    assert_same_ids(ours, bert, texts)


def test_tokenizer_json_of_minilm_neither_cuts_nor_fills(texts):
    assert_same_ids(Tokenizer.load(minilm_folder()), minilm_folder(), texts)


def test_word_pieces_of_a_pair_get_their_marks(vocab_file):
    ids = Tokenizer.load(vocab_file).backend.encode("Hello", "world").ids
    assert ids == [101, 7592, 102, 2088, 102]


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ({}, ["cafe", "[UNK]"]),
        ({"do_lower_case": True}, ["cafe", "[UNK]"]),
        ({"do_lower_case": False}, ["Café", "日", "本"]),
        ({"do_lower_case": True, "strip_accents": False}, ["café", "[UNK]"]),
        ({"do_lower_case": False, "tokenize_chinese_chars": False}, ["Café", "日本"]),
    ],
)
def test_tokenizer_config_rules_the_word_pieces(tmp_path, options, pieces):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Café", "café", "cafe"]
    words += ["日", "本", "日本"] if options.get("do_lower_case") is False else []
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    ids = Tokenizer.load(tmp_path).encode("Café 日本")
    produced = [words[i] for i in ids]
    assert list(dict.fromkeys(produced)) == pieces


def described(token: str, **flags: bool) -> dict[str, object]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": token, **plain, **flags}


KINDS = {  # kind of model -> its real tokenizer, and a fixture of its older files
    "bert": ("bert_base_uncased", "vocab_file"),
    "gpt_neo": ("gpt_neo_125m", "bpe_files"),
    "roberta": ("roberta_base", "roberta_files"),
    "llama": ("tinyllama", None),
}
MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False}
TAKING = {
    "__type": "AddedToken",
    "content": "<y>",
    "lstrip": True,
    "rstrip": True,
    "normalized": False,
}
BESIDE = {  # kind of model -> what tokenizer_config.json, added_tokens.json and perhaps
    # special_tokens_map.json say
    "bert": [
        ({"do_lower_case": False}, {}),
        ({"do_lower_case": True, "strip_accents": False}, {}),
        ({"do_lower_case": False, "strip_accents": True}, {}),
        ({"tokenize_chinese_chars": False}, {}),
        ({}, {"MYTOK": 30523, "[NEW]": 30522, "newtok": 30524}),
        ({"do_lower_case": False}, {"[NEW]": 30522}),
        ({"added_tokens_decoder": {"30522": described("[NEW]", special=True)}}, {}),
        ({"added_tokens_decoder": {"103": described("[MASK]", lstrip=True, normalized=True)}}, {}),
        ({"added_tokens_decoder": {"30522": described("[NEW]", lstrip=True)}}, {"[NEW]": 30522}),
        ({"pad_token": "<|new|>", "mask_token": "[NEW]"}, {}),
        ({}, {"[NEW]": 30523, "TOK": 30522}, {"pad_token": "[NEW]"}),
    ],
    "gpt_neo": [
        ({"add_prefix_space": True}, {}),
        ({"add_prefix_space": False}, {"TOK": 50258, "<|new|>": 50257}),
        ({"added_tokens_decoder": {"50257": described("<|new|>", rstrip=True)}}, {}),
        ({"pad_token": "[PAD]", "additional_special_tokens": ["<|new|>", "Hello"]}, {}),
        ({}, {}, {"pad_token": "[PAD]", "additional_special_tokens": ["TOK", TAKING]}),
    ],
    "roberta": [
        ({}, {}),
        ({}, {"TOK": 50265, "[NEW]": 50266}, {"mask_token": MASK, "pad_token": "[NEW]"}),
        ({"mask_token": {"__type": "AddedToken", **MASK}}, {}),
        ({"pad_token": "[PAD]", "mask_token": None}, {}),
        ({"extra_special_tokens": ["TOK"], "additional_special_tokens": ["[NEW]"]}, {}),
        ({"extra_special_tokens": {"first": "TOK"}, "image_token": "[PAD]"}, {}),
        ({"bos_token": "hi", "pad_token": "<|endoftext|>"}, {}),
        (
            {
                "added_tokens_decoder": {
                    "50265": described("TOK", special=True),
                    "50264": described("<mask>", lstrip=True, special=True),
                }
            },
            {},
            {"pad_token": "[PAD]"},  # not read, as those are described
        ),
    ],
    "llama": [
        ({"pad_token": "[PAD]"}, {}),
        ({}, {"TOK": 32000}, {"pad_token": "[PAD]", "additional_special_tokens": [TAKING]}),
    ],
}


@pytest.mark.parametrize(
    ("kind", "case", "older"),
    [
        (kind, case, older)
        for kind, table in BESIDE.items()
        for case in table
        for older in dict.fromkeys((None, KINDS[kind][1]))
    ],
    ids=str,
)
def test_what_lies_beside_a_tokenizer_counts(request, tmp_path, kind, case, older):
    """Against transformers' reading of the same folder."""
    folder = tmp_path
    if older is None:
        content = real_data("tokenizers", KINDS[kind][0], "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(content)
    else:
        request.getfixturevalue(older)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    names = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
    for name, content in zip(names, case, strict=False):
        (folder / name).write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    text = "Hello [NEW] [new] Café MYTOK mytok newtokx hi[MASK] x <|new|> TOK 日本 [PAD] <y> Hello"
    text += " <mask> <mask>hi <s></s><pad>\n<unk> <|endoftext|>"
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == expected
    assert ours.vocab_size == len(theirs)
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(text) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"[NEW]": 30600}, r'token "\[NEW\]" has id 30600, would get 30522'),
        ("added_tokens.json", {"hello": 5}, 'token "hello" has id 5, would get 7592'),
        ("added_tokens.json", {"[NEW]": "30522"}, "added_tokens.json is .*, must be an object"),
        (
            "tokenizer_config.json",
            {"do_lower_case": None},
            "do_lower_case is null, must be true or",
        ),
        ("tokenizer_config.json", {"strip_accents": "no"}, 'strip_accents is "no", must be'),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, r"added_tokens_decoder is \[\]"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"30522": {"\x1b[31m": "a"}}},
            "content",
        ),
    ],
)
def test_what_lies_beside_a_tokenizer_is_read_strictly(vocab_file, name, content, message):
    (vocab_file / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"cannot read the tokenizer in .*: .*{message}"):
        Tokenizer.load(vocab_file)


def test_half_of_a_surrogate_pair_is_named(gpt2):
    with pytest.raises(ValueError, match=r'cannot encode "ok \\ud83d": it holds half of'):
        Tokenizer.load(gpt2).encode("ok \ud83d")


def test_a_piece_without_a_token_is_an_error():
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")
    with pytest.raises(ValueError, match='cannot encode "b": '):
        Tokenizer(tokenizers.Tokenizer(model)).encode("b")


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_bytes_make_the_round_trip(gpt2, bpe_files, texts, files):
    tokenizer = Tokenizer.load(gpt2 if files == "tokenizer.json" else bpe_files)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_word_pieces_joins_them(vocab_file):
    tokenizer = Tokenizer.load(vocab_file)
    ids = tokenizer.encode("Unaffable tokenizers")
    assert len(ids) > 2
    assert tokenizer.decode(ids) == "unaffable tokenizers"


def test_tokenizer_json_comes_first(gpt2, vocab_file):
    (vocab_file / "tokenizer.json").write_bytes((gpt2 / "tokenizer.json").read_bytes())
    assert Tokenizer.load(vocab_file).vocab_size == 50257


def test_trained_tokenizer_makes_the_round_trip_through_its_file(texts, tmp_path):
    trained = Tokenizer.train(texts, 400)
    assert trained.vocab_size == 400
    assert trained.end_of_text == 0
    trained.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for text in [*texts, "unseen: Ωμέγα"]:
        ids = trained.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == text
    story = texts[-2] or texts[-3]
    assert len(trained.encode(story)) < 0.7 * len(story)
    assert_same_ids(trained, tmp_path, texts)


def test_trained_word_pieces_make_the_round_trip_through_their_file(texts, tmp_path):
    trained = Tokenizer.train_word_piece(texts, 600)
    assert trained.vocab_size == 600
    assert trained.special == Special(pad=0, unknown=1, first=2, last=3, mask=4)
    assert trained.end_of_text == 3
    assert trained.decode(trained.encode("  The Cat, SAT on a mât ")) == "the cat, sat on a mat"
    trained.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.special == trained.special
    for text in [*texts, "unseen: Ωμέγα"]:
        assert again.encode(text) == trained.encode(text)
    assert_same_ids(trained, tmp_path, texts)
    story = texts[-2] or texts[-3]
    assert len(trained.encode(story)) < 0.7 * len(story)


@pytest.mark.parametrize("learn", [Tokenizer.train, Tokenizer.train_word_piece])
def test_a_vocabulary_has_one_to_a_million_tokens(learn: Callable[..., Tokenizer]) -> None:
    for size in (1, 2**20):
        assert 1 <= learn(["a few words, a few letters"], size).vocab_size < 600
    for size in (0, -1, 2**20 + 1):
        with pytest.raises(ValueError, match=f"vocab_size is {size}, must be 1 to 1,048,576"):
            learn(["a"], size)


def test_word_pieces_are_learned_alike_every_time(texts):
    """The library's own numbering changes from run to run."""
    first, *others = [Tokenizer.train_word_piece(texts, 600).backend.to_str() for _ in range(4)]
    assert all(other == first for other in others)


def test_a_tokenizer_without_special_tokens_names_them(vocab_file):
    assert Tokenizer.load(vocab_file).special == Special(0, 100, 101, 102, 103)
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[PAD]": 0, "[UNK]": 1, "[SEP]": 2}, unk_token="[UNK]")
    )
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[MASK\]: it is of neither BERT's nor R"):
        _ = Tokenizer(backend).special
    backend.add_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    with pytest.raises(ValueError, match=r"lacks <mask>: "):
        _ = Tokenizer(backend).special


def test_special_tokens_of_roberta(roberta_files):
    tokenizer = Tokenizer.load(roberta_files)
    assert tokenizer.special == Special(pad=1, unknown=3, first=0, last=2, mask=50264)
    assert tokenizer.end_of_text == 2  # <|endoftext|> is an odd word of this vocabulary
    assert tokenizer.encode("<|endoftext|>") != [50260]


def test_the_special_tokens_of_roberta():
    words = ["<s>", "<pad>", "</s>", "<unk>", "word", "<mask>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    for lacking in (None, "<pad>"):
        kept = {word: i for word, i in vocabulary.items() if word != lacking}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(kept, unk_token="<unk>"))
        if lacking is None:
            assert Tokenizer(backend).special == Special(1, 3, 0, 2, 5)
        else:
            with pytest.raises(ValueError, match="of neither BERT's nor RoBERTa's kind"):
                _ = Tokenizer(backend).special


def test_word_level_vocabulary_without_a_separator_has_no_end_of_text():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 4}, unk_token="a"))
    tokenizer = Tokenizer(backend)
    assert tokenizer.end_of_text is None
    assert tokenizer.vocab_size == 5


@pytest.mark.parametrize("marks", [[], ["<s>"], ["<lang>", "<s>"]])
def test_a_text_starts_with_the_marks_of_its_file(marks: list[str]) -> None:
    ids = {"a": 0, "<s>": 1, "</s>": 2, "<lang>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="a"))
    backend.add_special_tokens([*ids][1:])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*marks, "$A", "</s>"], special_tokens=[*ids.items()][1:]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.start == [ids[mark] for mark in marks]
    assert tokenizer.encode("a") == [0]  # they are put there by who wants them


@pytest.mark.parametrize("rows", [50257, 50304, 50257 + 1023])
def test_model_with_rows_to_spare_fits(gpt2, rows):
    Tokenizer.load(gpt2).check(rows)


@pytest.mark.parametrize("rows", [50256, 30522, 50257 + 1024])
def test_mismatch_names_both_sizes(gpt2, rows):
    with pytest.raises(ValueError, match=f"50257 tokens, the model's vocabulary {rows}"):
        Tokenizer.load(gpt2).check(rows)


# files that are absent, empty or broken


def test_no_files_is_an_error_that_lists_the_kinds(tmp_path):
    kinds = (
        r"tokenizer\.json, vocab\.json and merges\.txt, vocab\.txt, or vocab\.txt and bpe\.codes"
    )
    kinds = f"no tokenizer in .*: want {kinds}$"
    with pytest.raises(ValueError, match=kinds):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")  # without merges.txt
    with pytest.raises(ValueError, match=kinds):
        Tokenizer.load(tmp_path)


EMPTY_JSON = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": EMPTY_JSON},
        {"vocab.json": "{}", "merges.txt": "#version: 0.2\n"},
        {"vocab.txt": ""},
    ],
    ids=lambda files: " and ".join(files),
)
def test_empty_vocabulary_is_an_error(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"vocabulary (is empty|lacks \[UNK\])"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b'{"model": '},
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"\xff\xfe"},
        {"vocab.json": b"[1, 2]", "merges.txt": b""},
        {"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"},
        {"vocab.txt": b"[UNK]\n\xff\xfe\n"},
        {"vocab.txt": b"[UNK]\na\n", "tokenizer_config.json": b"{"},
    ],
    ids=lambda files: " and ".join(f"{name} {content}" for name, content in files.items()),
)
def test_broken_file_is_an_error_that_names_the_folder(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the tokenizer in {tmp_path}"):
        Tokenizer.load(tmp_path)
