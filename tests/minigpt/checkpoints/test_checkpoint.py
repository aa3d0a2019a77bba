"""Checkpoints: what transformers writes opens here, what is written here opens there, the rest is
refused by name.
"""

import json
import logging
import pickle
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import minigpt
import peft_lite
from minigpt import Bert, BertConfig, GPTNeo, GPTNeoConfig
from minigpt.checkpoints.directory import outline
from tests.conftest import assert_close, hf_bert, hf_gpt_neo, tokens

IDS = tokens(101, 2, 13)
BUILDERS = {
    "GPTNeoForCausalLM": lambda: hf_gpt_neo(),
    "GPTNeoForCausalLM untied": lambda: hf_gpt_neo(tie_word_embeddings=False),
    "GPTNeoModel": lambda: hf_gpt_neo(transformers.GPTNeoModel),
    "BertForMaskedLM": lambda: hf_bert(transformers.BertForMaskedLM),
    "BertForSequenceClassification": lambda: hf_bert(
        transformers.BertForSequenceClassification, num_labels=3
    ),
    "BertModel": lambda: hf_bert(),
    "BertForPreTraining": lambda: hf_bert(transformers.BertForPreTraining),
}
MLM = "head.transform.weight head.transform.bias head.norm.weight head.norm.bias head.decoder.bias"
POOLER = "pooler.weight pooler.bias"
CLASSIFIER = "head.classifier.weight head.classifier.bias"
LOADS = [  # checkpoint, head asked for, head got, what is fresh
    ("GPTNeoForCausalLM", None, "causal-lm", ""),
    ("GPTNeoForCausalLM", "causal-lm", "causal-lm", ""),
    ("GPTNeoForCausalLM", "none", "none", ""),
    ("GPTNeoForCausalLM untied", None, "causal-lm", ""),
    ("GPTNeoForCausalLM untied", "none", "none", ""),
    ("GPTNeoModel", None, "causal-lm", ""),
    ("GPTNeoModel", "none", "none", ""),
    ("BertForMaskedLM", None, "masked-lm", ""),
    ("BertForMaskedLM", "masked-lm", "masked-lm", ""),
    ("BertForMaskedLM", "classification", "classification", f"{POOLER} {CLASSIFIER}"),
    ("BertForMaskedLM", "none", "none", POOLER),
    ("BertForSequenceClassification", None, "classification", ""),
    ("BertForSequenceClassification", "classification", "classification", ""),
    ("BertForSequenceClassification", "masked-lm", "masked-lm", MLM),
    ("BertForSequenceClassification", "none", "none", ""),
    ("BertModel", None, "none", ""),
    ("BertModel", "none", "none", ""),
    ("BertModel", "masked-lm", "masked-lm", MLM),
    ("BertModel", "classification", "classification", CLASSIFIER),
    ("BertForPreTraining", None, "masked-lm", ""),
    ("BertForPreTraining", "classification", "classification", CLASSIFIER),
    ("BertForPreTraining", "none", "none", ""),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(name)` -> (transformers' model, the folder it was saved to)."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            hf = BUILDERS[name]()
            hf.save_pretrained(folder)
            made[name] = hf, folder
        return made[name]

    return get


def copy(source: Path, target: Path, change=lambda tensors: None, **config) -> Path:
    """A checkpoint with its tensors changed in place and its config overridden (None: removed)."""
    settings = json.loads((source / "config.json").read_text()) | config
    settings = {name: value for name, value in settings.items() if value is not None}
    (target / "config.json").write_text(json.dumps(settings))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors")
    return target


def body(hf: torch.nn.Module) -> torch.nn.Module:
    return getattr(hf, hf.base_model_prefix, hf)


def warnings_of(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.name == "minigpt"]


@torch.no_grad()
@pytest.mark.parametrize(("name", "asked", "got", "fresh"), LOADS)
def test_every_head_of_every_checkpoint(checkpoint, caplog, name, asked, got, fresh):
    hf, folder = checkpoint(name)
    ours = minigpt.load(folder, head=asked)
    assert not ours.training
    assert all(p.isfinite().all() and p.requires_grad for p in ours.parameters())
    assert_close(ours.hidden(IDS), body(hf)(IDS)[0])
    assert (got == "none") == isinstance(ours.head, torch.nn.Identity)
    assert hasattr(ours.head, "classifier") == (got == "classification")

    if not fresh:
        assert warnings_of(caplog) == []
        if got != "none" and "Model" not in name:
            assert_close(ours(IDS), hf(IDS)[0])
        return
    (warning,) = warnings_of(caplog)
    assert caplog.records[-1].levelno == logging.WARNING
    assert set(warning.split("lacks ")[1].split(": ")[0].split(", ")) == set(fresh.split())
    parameters = dict(ours.named_parameters())
    for n in fresh.split():
        if n.endswith("bias"):
            assert not parameters[n].any(), n
        elif "norm" in n:
            assert (parameters[n] == 1).all(), n
        elif "classifier" not in n:
            assert parameters[n].std().item() == pytest.approx(0.2, rel=0.2), n
        else:
            assert 0.1 < parameters[n].std() < 0.4, n


@torch.no_grad()
def test_bare_decoder_predicts_through_its_tied_embedding(checkpoint):
    hf, folder = checkpoint("GPTNeoModel")
    assert_close(minigpt.load(folder)(IDS), hf(IDS)[0] @ hf.wte.weight.T)


def test_untied_bare_decoder_gets_a_fresh_head(checkpoint, tmp_path, caplog):
    folder = copy(checkpoint("GPTNeoModel")[1], tmp_path, tie_word_embeddings=False)
    ours = minigpt.load(folder)
    assert "head.weight" in warnings_of(caplog)[0]
    assert not torch.equal(ours.head.weight, ours.embeddings.token.weight)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("GPTNeoForCausalLM", None),
        ("GPTNeoModel", None),
        ("BertForMaskedLM", None),
        ("BertModel", "masked-lm"),
    ],
)
def test_tied_weights_are_one_parameter(checkpoint, name, head):
    ours = minigpt.load(checkpoint(name)[1], head=head)
    head = ours.head.decoder if isinstance(ours, Bert) else ours.head
    assert head.weight is ours.embeddings.token.weight
    tied = [p for p in ours.parameters() if p.shape == head.weight.shape]
    assert len(tied) == 1


@pytest.mark.parametrize(
    ("num_labels", "classes", "kept"), [(None, 3, True), (3, 3, True), (5, 5, False)]
)
def test_num_labels(checkpoint, caplog, num_labels, classes, kept):
    hf, folder = checkpoint("BertForSequenceClassification")
    ours = minigpt.load(folder, head="classification", num_labels=num_labels)
    assert ours(IDS).shape == (2, classes)
    assert torch.equal(ours.head.classifier.weight, hf.classifier.weight) == kept
    assert bool(warnings_of(caplog)) != kept
    assert torch.equal(ours.pooler.weight, hf.bert.pooler.dense.weight)


@pytest.mark.parametrize(("num_labels", "classes"), [(None, 2), (4, 4)])
def test_num_labels_of_a_fresh_classifier(checkpoint, num_labels, classes):
    ours = minigpt.load(checkpoint("BertModel")[1], head="classification", num_labels=num_labels)
    assert ours(IDS).shape == (2, classes)


def test_the_names_of_classes_are_carried(tmp_path):
    names = {0: "negative", 1: "positive", 2: "neither"}
    hf = hf_bert(transformers.BertForSequenceClassification, id2label=names)
    hf.save_pretrained(tmp_path / "hf")
    ours = minigpt.load(tmp_path / "hf")
    assert ours.config.id2label == {str(i): name for i, name in names.items()}
    minigpt.save(ours, tmp_path / "ours")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert again.id2label == names
    assert again.label2id == {name: i for i, name in names.items()}
    other = minigpt.load(tmp_path / "hf", head="classification", num_labels=2)
    minigpt.save(other, tmp_path / "other")  # two classes, to which three names do not belong
    assert transformers.AutoConfig.from_pretrained(tmp_path / "other").id2label == {
        0: "LABEL_0",
        1: "LABEL_1",
    }


def test_num_labels_below_one_is_an_error(checkpoint):
    with pytest.raises(ValueError, match="num_labels is 0"):
        minigpt.load(checkpoint("BertModel")[1], head="classification", num_labels=0)


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("GPTNeoModel", "classification", "'classification': GPTNeo has causal-lm, none"),
        ("BertModel", "mask-lm", "'mask-lm': Bert has .*did you mean 'masked-lm'"),
    ],
)
def test_unknown_head_is_an_error(checkpoint, name, head, message):
    with pytest.raises(ValueError, match=message):
        minigpt.load(checkpoint(name)[1], head=head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_of_all_parameters(checkpoint, dtype):
    hf, folder = checkpoint("BertModel")
    ours = minigpt.load(folder, head="masked-lm", dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    expected = hf.pooler.dense.weight.to(dtype)
    assert torch.equal(minigpt.load(folder, dtype=dtype).pooler.weight, expected)
    assert ours(IDS).dtype == dtype


def test_half_precision_file_is_read_as_float32(checkpoint, tmp_path):
    def halve(tensors):
        tensors.update({name: t.bfloat16() for name, t in tensors.items()})

    hf, folder = checkpoint("BertModel")
    ours = minigpt.load(copy(folder, tmp_path, halve))
    assert torch.equal(ours.pooler.weight, hf.pooler.dense.weight.bfloat16().float())


# files


def same_as(hf, folder: Path) -> None:
    with torch.no_grad():
        assert_close(minigpt.load(folder)(IDS), hf(IDS)[0])


def as_bin(folder: Path, target: Path, **options) -> Path:
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / "model.safetensors"), target / "pytorch_model.bin", **options)
    return target


def test_shards(checkpoint, tmp_path):
    hf, _ = checkpoint("GPTNeoForCausalLM")
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    same_as(hf, tmp_path)


def test_missing_shard_is_named(checkpoint, tmp_path):
    checkpoint("GPTNeoForCausalLM")[0].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        minigpt.load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "model.safetensors.index.json"),
        ("{}", "model.safetensors.index.json.*weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', '"../secret.safetensors" lies outside'),
        ('{"weight_map": {"a": 3}}', "model.safetensors.index.json: weight_map is .* an object"),
        ('{"weight_map": null}', "weight_map is null, must be an object"),
        ('{"weight_map": {"a": ""}}', 'shard "" lies outside'),
        ('{"weight_map": {"a": "\\u001b[31m"}}', r'shard "\\u001b\[31m" lies outside'),
        ('{"weight_map": {"a": "b", "a": "c"}}', 'the key "a" stands twice'),
    ],
)
def test_bad_index_is_an_error(checkpoint, tmp_path, index, message):
    copy(checkpoint("BertModel")[1], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        minigpt.load(tmp_path)


def test_a_tensor_in_two_shards_or_in_none_is_named(checkpoint, tmp_path):
    checkpoint("BertModel")[0].save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"lost": places["pooler.dense.bias"]}}))
    with pytest.raises(ValueError, match=r"index\.json: lost does not lie in model-"):
        minigpt.load(tmp_path)
    first, *_, last = sorted(set(places.values()))
    copied = next(name for name, shard in places.items() if shard == first)
    tensors = load_file(tmp_path / last)
    save_file(tensors | {copied: load_file(tmp_path / first)[copied]}, tmp_path / last)
    with pytest.raises(ValueError, match=f"index.json: {copied} lies in two shards"):
        minigpt.load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pytorch_model_bin(checkpoint, tmp_path, zipped):
    hf, folder = checkpoint("BertForMaskedLM")
    same_as(hf, as_bin(folder, tmp_path, _use_new_zipfile_serialization=zipped))


@pytest.mark.parametrize(
    "content",
    [b"\x80", b".", b"h\x05.", b"X\x01\x00\x00", b"\x80\x02]q\x00h\xff.", b"\x1b[31m", b"(((((."],
    ids=repr,
)
def test_a_few_bytes_are_no_checkpoint(checkpoint, tmp_path, content):
    """One line, without torch's advice to unpickle anything."""
    as_bin(checkpoint("BertModel")[1], tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*pytorch_model\.bin") as caught:
        minigpt.load(tmp_path)
    assert str(caught.value).isprintable()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("change", ["expanded", "sparse", "meta"])
def test_tensors_that_are_not_plain_are_refused(checkpoint, tmp_path, change):
    as_bin(checkpoint("BertModel")[1], tmp_path)
    one = torch.ones(1, 1)
    tensor = {
        "expanded": lambda: one.expand(30_000, 30_000),
        "sparse": lambda: one.to_sparse(),
        "meta": lambda: torch.empty(30, 30, device="meta"),
    }[change]()
    torch.save({"pooler.dense.weight": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: (its tensors take|pooler)"):
        minigpt.load(tmp_path)


def test_views_of_one_storage_become_parameters_of_their_own(checkpoint, tmp_path):
    """Untied in the config, one in the file: what trains one must not move the other."""
    folder = as_bin(checkpoint("GPTNeoForCausalLM")[1], tmp_path)
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    frozen = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}
    torch.save(frozen, folder / "pytorch_model.bin")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    ours = minigpt.load(folder)
    assert torch.equal(ours.head.weight, ours.embeddings.token.weight)
    assert ours.head.weight.data_ptr() != ours.embeddings.token.weight.data_ptr()
    assert all(p.requires_grad for p in ours.parameters())


def test_malicious_pickle_is_refused_unexecuted(checkpoint, tmp_path):
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (marker,)

    as_bin(checkpoint("BertModel")[1], tmp_path)
    torch.save({"weight": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        minigpt.load(tmp_path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious()))  # it would have
    assert marker.exists()


@pytest.mark.parametrize("keep", [0, 5, 1000])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_file_is_named(checkpoint, tmp_path, kind, keep):
    folder = checkpoint("BertModel")[1]
    copy(folder, tmp_path) if kind == "model.safetensors" else as_bin(folder, tmp_path)
    path = tmp_path / kind
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"cannot read .*{kind}"):
        minigpt.load(tmp_path)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(2)], ids=str)
def test_pickle_of_anything_but_named_tensors_is_refused(checkpoint, tmp_path, content):
    as_bin(checkpoint("BertModel")[1], tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        minigpt.load(tmp_path)


def test_no_weights_is_an_error(checkpoint, tmp_path):
    (copy(checkpoint("BertModel")[1], tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights in .*want model\.safetensors"):
        minigpt.load(tmp_path)


# names of tensors


def with_prefix(prefix):
    def change(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("name", "prefix"), [("GPTNeoModel", "transformer."), ("BertModel", "bert.")]
)
def test_prefix_is_optional(checkpoint, tmp_path, name, prefix):
    hf, folder = checkpoint(name)
    assert not any(n.startswith(prefix) for n in load_file(folder / "model.safetensors"))
    folder = copy(folder, tmp_path, with_prefix(prefix))
    with torch.no_grad():
        assert_close(minigpt.load(folder, head="none")(IDS), hf(IDS)[0])


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_gamma_and_beta_of_old_checkpoints(checkpoint, tmp_path, name):
    def age(tensors):
        for new, old in (
            ("LayerNorm.weight", "LayerNorm.gamma"),
            ("LayerNorm.bias", "LayerNorm.beta"),
        ):
            for n in [n for n in tensors if n.endswith(new)]:
                tensors[n.replace(new, old)] = tensors.pop(n)
        assert any(n.endswith("gamma") for n in tensors)

    hf, folder = checkpoint(name)
    same_as(hf, copy(folder, tmp_path, age))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_attention_mask_buffers_are_ignored(checkpoint, tmp_path, prefix):
    def add(tensors):
        with_prefix(prefix)(tensors)
        tensors[f"{prefix}h.0.attn.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        tensors[f"{prefix}h.1.attn.attention.masked_bias"] = torch.tensor(-1e9)

    hf, folder = checkpoint("GPTNeoModel")
    ours = minigpt.load(copy(folder, tmp_path, add), head="none")
    assert_close(ours(IDS).detach(), hf(IDS)[0].detach())


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_position_ids_buffer_is_ignored(checkpoint, tmp_path, prefix):
    def add(tensors):
        with_prefix(prefix)(tensors)
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(48)[None]

    hf, folder = checkpoint("BertModel")
    same_as(hf, copy(folder, tmp_path, add))


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors)})


BROKEN = {
    "missing": ("GPTNeoForCausalLM", drop("transformer.h.1.mlp.c_fc.bias"),
                "1 tensors are missing: transformer.h.1.mlp.c_fc.bias"),
    "missing embedding": ("GPTNeoForCausalLM", drop("transformer.wte.weight"),
                          "missing: transformer.wte.weight"),
    "missing in the head": ("BertForMaskedLM", drop("cls.predictions.transform.dense.weight"),
                            "missing: cls.predictions.transform.dense.weight"),
    "missing in the classifier": ("BertForSequenceClassification", drop("classifier.bias"),
                                  "missing: classifier.bias"),
    "missing in a bare body": ("BertModel", drop("encoder.layer.0.output.dense.bias"),
                               r"missing: (bert\.)?encoder.layer.0.output.dense.bias"),
    "unexpected": ("GPTNeoForCausalLM", put("transformer.h.0.surprise", lambda t: torch.ones(2)),
                   "1 tensors have no place: transformer.h.0.surprise"),
    "one block too many": ("BertModel", put("encoder.layer.2.output.dense.bias",
                           lambda t: t["encoder.layer.1.output.dense.bias"].clone()),
                           "no place: .*encoder.layer.2.output.dense.bias"),
    "misshapen": ("GPTNeoForCausalLM", put("transformer.ln_f.bias", lambda t: torch.ones(31)),
                  r"transformer.ln_f.bias is \[31\], the config wants \[30\]"),
    "transposed": ("BertModel", put("encoder.layer.1.output.dense.weight",
                   lambda t: t["encoder.layer.1.output.dense.weight"].T),
                   r"encoder.layer.1.output.dense.weight is \[50, 30\].*\[30, 50\]"),
    "tied but different": ("GPTNeoForCausalLM", put("lm_head.weight",
                           lambda t: t["transformer.wte.weight"] + 1),
                           "lm_head.weight differs from the weight it is tied to"),
    "tied but different in BERT": ("BertForMaskedLM", put("cls.predictions.decoder.weight",
                                   lambda t: t["bert.embeddings.word_embeddings.weight"] + 1),
                                   "cls.predictions.decoder.weight differs"),
    "NaN": ("BertModel", put("pooler.dense.bias", lambda t: torch.full((30,), torch.nan)),
            r"pooler.dense.bias holds what is no finite torch.float32"),
    "one infinity": ("GPTNeoForCausalLM", put("transformer.ln_f.bias",
                     lambda t: torch.cat([torch.zeros(29), torch.tensor([-torch.inf])])),
                     r"transformer.ln_f.bias holds what is no finite"),
    "beyond float32": ("BertModel", put("pooler.dense.bias",
                       lambda t: torch.full((30,), 1e39, dtype=torch.float64)),
                       r"pooler.dense.bias holds what is no finite torch.float32"),
    "complex": ("BertModel", put("pooler.dense.bias",
                lambda t: torch.ones(30, dtype=torch.complex64)),
                r"pooler.dense.bias is torch.complex64, must be one of torch.float32, "),
    "whole numbers": ("BertModel", put("pooler.dense.bias",
                      lambda t: torch.ones(30, dtype=torch.int8)),
                      r"pooler.dense.bias is torch.int8, must be one of"),
    "escape codes": ("BertModel", put("\x1b[31mred", lambda t: torch.ones(2)),
                     r"no place: .*\\u001b\[31mred"),
    "braces": ("BertModel", put("bert.encoder.layer.{}.output.dense.bias",
               lambda t: torch.ones(30)), "no place"),
    "no number in a name": ("BertModel", put("bert.encoder.layer.{}.output.dense.bias",
                            lambda t: torch.ones(30)), r"layer.\{\}.output"),
    "two biases": ("BertForMaskedLM", put("cls.predictions.decoder.bias",
                   lambda t: t["cls.predictions.bias"] + 1),
                   "both cls.predictions.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_tensor_at_fault_is_named(checkpoint, tmp_path, case):
    name, change, message = BROKEN[case]
    folder = copy(checkpoint(name)[1], tmp_path, change)
    with pytest.raises(ValueError, match=message):
        minigpt.load(folder)


def test_equal_copies_of_tied_tensors_are_accepted(checkpoint, tmp_path):
    hf, folder = checkpoint("BertForMaskedLM")
    twice = put(
        "cls.predictions.decoder.weight",
        lambda t: t["bert.embeddings.word_embeddings.weight"].clone(),
    )
    same_as(hf, copy(folder, tmp_path, twice))


# config.json


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("BertModel", {"model_type": "t5"}, "'t5' is unknown.*gpt_neo, gpt2, bert"),
        ("BertModel", {"model_type": "brt"}, "did you mean 'bert'"),
        ("BertModel", {"model_type": None}, "model_type None"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "'relative_key' is not supp"),
        ("BertModel", {"is_decoder": True}, "is_decoder True is not supported"),
        ("BertModel", {"add_cross_attention": True}, "add_cross_attention True"),
        ("BertModel", {"hidden_act": "swiglu"}, "hidden_act is 'swiglu'"),
        ("BertModel", {"hidden_size": 32}, "hidden_size 32 is no multiple of num_attention_heads"),
        ("BertModel", {"hidden_size": "30"}, 'config.json: hidden_size is "30", must be a whole'),
        ("BertModel", {"hidden_size": 30.0}, "hidden_size is 30.0, must be a whole number"),
        ("BertModel", {"num_attention_heads": True}, "num_attention_heads is true, must be"),
        ("BertModel", {"hidden_act": 5}, "hidden_act is 5, must be a text"),
        ("BertModel", {"hidden_act": "\x1b[31m"}, r"hidden_act is '\\x1b\[31m', must be one"),
        ("BertModel", {"model_type": ["bert"]}, r"model_type \['bert'\] is unknown"),
        ("BertModel", {"architectures": "BertModel"}, "architectures is .* must be a list or null"),
        ("BertModel", {"id2label": {"one": "a"}}, "id2label .*: want the numbers of the classes"),
        ("BertModel", {"id2label": ["a", "b"]}, "id2label is .*, must be an object or null"),
        ("BertModel", {"layer_norm_eps": -1e-5}, r"layer_norm_eps is -1e-05, must lie in \[0, 1\]"),
        ("BertModel", {"initializer_range": -1}, "initializer_range is -1, must lie"),
        ("GPTNeoModel", {"intermediate_size": 0}, "intermediate_size is 0, must lie in"),
        ("GPTNeoModel", {"attention_types": [[["global"], 10**9]]}, "more than 1,000 layers"),
        ("GPTNeoModel", {"attention_types": [[[], 10**9], [["local"], 2]]}, "attention_layers"),
        ("GPTNeoModel", {"attention_layers": ["local", "global"]}, "contradicts attention_types"),
        (
            "GPTNeoModel",
            {"num_attention_heads": 5},
            "num_attention_heads 5 contradicts num_heads 3",
        ),
        ("GPTNeoModel", {"attention_types": [[["global"], 1]]}, "attention_layers"),
        ("GPTNeoModel", {"attention_types": [[["banded"], 2]]}, "'banded'"),
        ("GPTNeoModel", {"attention_types": 7}, "config.json"),
        ("GPTNeoModel", {"activation_function": "gelu_old"}, "gelu_old"),
    ],
)
def test_bad_setting_is_named(checkpoint, tmp_path, name, settings, message):
    folder = copy(checkpoint(name)[1], tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        minigpt.load(folder)


@pytest.mark.parametrize("value", [10**9, 10**30, -1])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("BertModel", n) for n, kind in BertConfig.__annotations__.items() if kind is int),
        *(("GPTNeoModel", n) for n, kind in GPTNeoConfig.__annotations__.items() if kind is int),
    ],
)
def test_sizes_out_of_reason_are_refused_before_anything_is_built(
    checkpoint, tmp_path, monkeypatch, name, field, value
):
    folder = copy(checkpoint(name)[1], tmp_path, **{field: value})
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    for reads in (minigpt.load, outline):
        with pytest.raises(ValueError, match=f"config.json: {field} is {value}, must lie in"):
            reads(folder)


@pytest.mark.parametrize(
    "content", ["NaN", "1e999", "[" * 10**5 + "]" * 10**5, '1, "vocab_size": 2']
)
def test_config_that_is_no_strict_json_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(f'{{"model_type": "bert", "vocab_size": {content}}}')
    with pytest.raises(ValueError, match=r"cannot read .*config\.json: ") as caught:
        minigpt.load(tmp_path)
    assert len(str(caught.value)) < 300


NATIVE = {"gpt_neo": GPTNeoConfig, "bert": BertConfig}


@pytest.mark.parametrize("kind", NATIVE)
def test_absent_fields_mean_what_they_mean_to_transformers(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = outline(tmp_path).config
    compared = [field.name for field in fields(ours) if field.name != "id2label"]
    assert {n: getattr(ours, n) for n in compared if n != "attention_layers"} == {
        n: getattr(theirs, n) for n in compared if n != "attention_layers"
    }
    if kind == "gpt_neo":
        assert list(ours.layers) == theirs.attention_layers


@torch.no_grad()
@pytest.mark.parametrize("alias", [False, True])
def test_the_number_of_heads_is_transformers(tmp_path, alias):
    """Of 48 columns; no tensor's shape tells 16 heads from 12."""
    heads = {"hidden_size": 48, "num_heads": 8 if alias else 16}
    hf = hf_gpt_neo(**heads)
    hf.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["num_heads"]
    if alias:
        settings["num_attention_heads"] = 8
    (tmp_path / "config.json").write_text(json.dumps(settings))
    same_as(hf, tmp_path)


def test_attention_types_decide_the_layers(checkpoint, tmp_path):
    """With the list that transformers writes beside it, and without."""
    hf, folder = checkpoint("GPTNeoForCausalLM")
    types = [[["local"], 1], [["global"], 1]]
    folder = copy(folder, tmp_path, attention_types=types, attention_layers=None)
    ours = minigpt.load(folder)
    assert ours.config.layers == ("local", "global")
    assert (ours(IDS) - hf(IDS)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"], ids=["cut", "list", "binary"])
def test_unreadable_config_is_an_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        minigpt.load(tmp_path)


def test_missing_config_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in"):
        minigpt.load(tmp_path)


# heads that there is no code for


OTHERS = ["MultipleChoice", "TokenClassification", "QuestionAnswering", "NextSentencePrediction"]


@torch.no_grad()
@pytest.mark.parametrize("head", [None, "none", "classification", "masked-lm"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_head_of_another_task_is_left_out(tmp_path, caplog, name, head):
    hf = hf_bert(getattr(transformers, f"BertFor{name}"))
    hf.save_pretrained(tmp_path)
    ours = minigpt.load(tmp_path, head=head)
    assert f"no code for the head of 'BertFor{name}'" in warnings_of(caplog)[0]
    assert ours.head_kind == (head or "none")
    assert outline(tmp_path).head_kind == "none"
    assert_close(ours.hidden(IDS), hf.bert(IDS)[0])
    if head == "classification":
        assert "head.classifier.weight" in warnings_of(caplog)[1]
        assert ours.head.classifier.weight.shape == (2, 30)
        assert not hasattr(hf, "classifier") or not torch.equal(
            ours.head.classifier.weight, hf.classifier.weight
        )


def test_a_decoder_that_classifies_is_a_body(tmp_path, caplog):
    hf = hf_gpt_neo(transformers.GPTNeoForSequenceClassification, pad_token_id=0)
    hf.save_pretrained(tmp_path)
    assert minigpt.load(tmp_path).head_kind == "none"
    assert "'GPTNeoForSequenceClassification'" in warnings_of(caplog)[0]


def test_a_classifier_of_tokens_is_told_by_its_tensors(tmp_path):
    """Where config.json names no class: it has no pooler, which a classifier of texts reads."""
    hf_bert(transformers.BertForTokenClassification).save_pretrained(tmp_path)
    folder = copy(tmp_path, tmp_path, architectures=None)
    with pytest.raises(ValueError, match=r"2 tensors are missing: bert\.pooler\.dense\.bias"):
        minigpt.load(folder)
    assert minigpt.load(folder, head="none").head_kind == "none"


# where a model comes from


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./no-such", "a/b/c", "no such model", "", "/" + "x" * 5000]
)
def test_missing_path_is_an_error_without_asking_the_hub(monkeypatch, source):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match="no such model directory"):
        minigpt.load(source)


def test_a_model_knows_its_folder_from_anywhere(checkpoint, monkeypatch):
    folder = checkpoint("BertModel")[1]
    monkeypatch.chdir(folder.parent)
    assert minigpt.load(folder.name).name_or_path == str(folder.resolve())
    assert Bert(BertConfig(hidden_size=12, num_hidden_layers=1)).name_or_path is None


def test_a_file_is_no_model_directory(checkpoint):
    with pytest.raises(ValueError, match="no such model directory"):
        minigpt.load(checkpoint("BertModel")[1] / "config.json")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot find it\nmore\nlines"),
        HFValidationError("cannot find it"),
        ConnectionError("cannot find it"),
        OSError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_hub_that_does_not_answer_is_one_line(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="someone/model") as caught:
        minigpt.load("someone/model")
    assert "\n" not in str(caught.value)
    assert not str(error) or "cannot find it" in str(caught.value)
    assert str(caught.value).endswith("; try bundled, or bundled-bert for an encoder")
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
def test_hub_gives_a_model(monkeypatch, checkpoint, tmp_path, old):
    """The `.bin` file is asked for only where there are no safetensors."""
    hf, folder = checkpoint("GPTNeoForCausalLM")
    as_bin(folder, tmp_path) if old else copy(folder, tmp_path)
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, "*.bin" in allow_patterns))
        assert {"*.json", "*.safetensors"} <= set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ours = minigpt.load("someone/model")
    with torch.no_grad():
        assert_close(ours(IDS), hf(IDS)[0])
    assert ours.name_or_path == "someone/model"
    assert asked == [("someone/model", False)] + [("someone/model", True)] * old


# saving


SAVES = [
    ("GPTNeoForCausalLM", "causal-lm"),
    ("GPTNeoForCausalLM untied", "causal-lm"),
    ("GPTNeoForCausalLM", "none"),
    ("BertForMaskedLM", "masked-lm"),
    ("BertForSequenceClassification", "classification"),
    ("BertModel", "none"),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "head"), SAVES)
def test_saved_model_opens_in_transformers(checkpoint, tmp_path, name, head):
    ours = minigpt.load(checkpoint(name)[1], head=head)
    minigpt.save(ours, tmp_path)
    title = json.loads((tmp_path / "config.json").read_text())["architectures"]
    hf, info = getattr(transformers, title[0]).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    output = hf.eval()(IDS)[0]
    assert_close(ours(IDS), output)
    assert head == "none" or output.shape == checkpoint(name)[0](IDS)[0].shape


@pytest.mark.parametrize(("name", "head"), SAVES)
def test_save_then_load_is_equal_to_the_bit(checkpoint, tmp_path, name, head):
    ours = minigpt.load(checkpoint(name)[1], head=head)
    minigpt.save(ours, tmp_path / "new" / "folder")
    again = minigpt.load(tmp_path / "new" / "folder")
    if (name, head) == ("GPTNeoForCausalLM", "none"):
        again = minigpt.load(tmp_path / "new" / "folder", head="none")
    state, expected = again.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    for n, tensor in state.items():
        assert torch.equal(tensor, expected[n]), n
    assert again.config.layers == ours.config.layers if isinstance(ours, GPTNeo) else True
    settings = vars(again.config) | {"attention_layers": None}
    assert settings == vars(ours.config) | {"attention_layers": None}
    assert not list(tmp_path.rglob("*.partial"))


def test_saving_keeps_the_dtype_in_the_file(checkpoint, tmp_path):
    minigpt.save(minigpt.load(checkpoint("BertModel")[1], dtype=torch.bfloat16), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_saving_over_its_own_files(checkpoint, tmp_path):
    hf, folder = checkpoint("GPTNeoForCausalLM")
    ours = minigpt.load(copy(folder, tmp_path))
    minigpt.save(ours, tmp_path)
    assert_close(ours(IDS).detach(), hf(IDS)[0].detach())
    same_as(hf, tmp_path)


def test_model_with_an_adapter_is_not_saved(checkpoint, tmp_path):
    ours = minigpt.load(checkpoint("BertModel")[1])
    handle = peft_lite.attach(ours, peft_lite.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"lora_a.*fold or detach"):
        minigpt.save(ours, tmp_path)
    assert not list(tmp_path.iterdir())
    handle.detach()
    minigpt.save(ours, tmp_path)
