"""The files of a tokenizer, as transformers reads them.

vocab.txt and bpe.codes        PhoBERT's BPE of words (minigpt/data/phobert.py)
tokenizer.json                 all of a tokenizer, as the `tokenizers` library writes it
vocab.json and merges.txt      byte-level BPE: GPT-2's, RoBERTa's
vocab.txt                      WordPiece: BERT's

tokenizer_config.json has settings, and tokens that were added to the vocabulary.  Older checkpoints
have these in added_tokens.json and special_tokens_map.json, which count where
tokenizer_config.json lacks `added_tokens_decoder`.  A special token that the vocabulary lacks gets
the next id.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from minigpt.data import phobert
from minigpt.data.phobert import Phobert
from peft_lite.json_files import check_types, read_optional, short

FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")  # of an added token
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("extra_special_tokens", "additional_special_tokens")  # today's name and the older one
TOKEN = str | dict[str, str | bool] | None
SETTINGS: dict[str, Any] = {  # of tokenizer_config.json, where they change the ids
    "do_lower_case": bool,
    "strip_accents": bool | None,
    "tokenize_chinese_chars": bool,
    "add_prefix_space": bool | None,
    "normalization": bool | None,
    "added_tokens_decoder": dict[str, dict[str, str | bool]] | None,
    **dict.fromkeys(NAMED, TOKEN),
    **dict.fromkeys(LISTS, list[TOKEN] | dict[str, TOKEN] | None),
}

# the special tokens of a vocabulary, unless the settings name others
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
BERT_NAMES = dict(zip(ROLES, BERT, strict=True))
ROBERTA_NAMES = {
    **dict(zip(ROLES, ROBERTA, strict=True)),
    "bos_token": "<s>",
    "eos_token": "</s>",
}
GPT2_NAMES = {"eos_token": "<|endoftext|>"}


def read(folder: Path) -> tokenizers.Tokenizer | Phobert | None:
    """The tokenizer of a folder; None where it holds none.

    Raises:
        ValueError: a file cannot be read, or an added token has another id than the next.
        Exception: the library's own, for a file that is damaged.
    """
    settings = read_optional(folder / "tokenizer_config.json")
    check_types(settings, SETTINGS, "tokenizer_config.json: ")
    described = settings.get("added_tokens_decoder")
    ids: Mapping[str, Any] = {}
    if described is None:
        ids = read_optional(folder / "added_tokens.json")
        check_types({"added_tokens.json": ids}, {"added_tokens.json": dict[str, int]})
        names = read_optional(folder / "special_tokens_map.json")
        check_types(names, SETTINGS, "special_tokens_map.json: ")
        settings |= names
    backend, defaults = _vocabulary(folder, settings)
    if backend is None:
        return None
    named = _named(defaults | settings)
    if isinstance(backend, Phobert):  # their flags count in added_tokens_decoder alone
        named = [AddedToken(token.content, special=True) for token in named]
    tokens = [(int(number), _token(token)) for number, token in (described or {}).items()]
    special = {token.content for token in named}
    tokens += [(i, _token(token, special=token in special)) for token, i in ids.items()]
    for number, token in sorted(tokens, key=lambda pair: pair[0]):
        backend.add_tokens([token])
        if (given := backend.token_to_id(token.content)) != number:
            raise ValueError(f"token {short(token.content)} has id {number}, would get {given}")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in named if token.content not in known])
    return backend


def word_pieces(model: models.WordPiece) -> tokenizers.Tokenizer:
    """A tokenizer of BERT's kind."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    if backend.token_to_id("[UNK]") is None:
        raise ValueError("the vocabulary lacks [UNK], the token of unknown words")
    first, last = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    if first is not None and last is not None:
        backend.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    return backend


def _vocabulary(
    folder: Path, settings: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer | Phobert | None, dict[str, str]]:
    """From the first kind of files that is there, and the names of its special tokens where those
    files do not tell.
    """
    if all((folder / name).exists() for name in phobert.FILES):
        if settings.get("normalization"):
            raise ValueError("normalization is true, which is BERTweet's, must be false")
        for name in ("bos_token", "pad_token", "eos_token", "unk_token"):
            token, known = settings.get(name), ROBERTA_NAMES[name]
            if token is not None and _token(token).content != known:
                raise ValueError(f"{name} is {short(token)}, must be {short(known)} as in PhoBERT")
        return Phobert.read(folder), ROBERTA_NAMES
    defaults: dict[str, str] = {}
    if (folder / "tokenizer.json").exists():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        pair = (str(folder / "vocab.json"), str(folder / "merges.txt"))
        backend = tokenizers.Tokenizer(models.BPE.from_file(*pair))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        roberta = all(backend.token_to_id(token) is not None for token in ROBERTA)
        defaults = ROBERTA_NAMES if roberta else GPT2_NAMES
    elif (folder / "vocab.txt").exists():
        model = models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]")
        backend, defaults = word_pieces(model), BERT_NAMES
    else:
        return None, defaults
    _apply(settings, backend)
    there = {n: token for n, token in defaults.items() if backend.token_to_id(token) is not None}
    return backend, there


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


def _named(settings: Mapping[str, Any]) -> list[AddedToken]:
    """The special tokens that the settings name, in the order in which they get ids."""
    others = [name for name in settings if name.endswith("_token") and name not in NAMED]
    values = [settings.get(name) for name in (*NAMED, *others)]
    newer, older = (settings.get(name) or () for name in LISTS)
    if isinstance(newer, Mapping):
        values += newer.values()
    values += older if isinstance(newer, Mapping) or not newer else newer
    tokens = [_token(value, special=True) for value in values if isinstance(value, str | dict)]
    return [token for token in tokens if token.content]


def _token(token: str | Mapping[str, Any], **flags: bool) -> AddedToken:
    """A token that is given as a text, or with its flags."""
    if isinstance(token, str):
        return AddedToken(token, **flags)
    given = {name: token[name] for name in FLAGS if name in token}
    return AddedToken(token["content"], **given | flags)
