"""BERT against transformers' in fp32: small, BERT-base and the pretrained all-MiniLM-L6-v2."""

import pytest
import torch
import transformers
from torch import nn

import minigpt
from minigpt import Bert, BertConfig, Tokenizer
from minigpt.models.attention import fast_attention, naive_attention
from tests.conftest import (
    DATA,
    assert_close,
    assert_same_gradients,
    assert_sharp,
    hf_bert,
    minilm_folder,
    padded,
    sibling,
    tokens,
)

T = 19
CLASSES = {
    "masked-lm": transformers.BertForMaskedLM,
    "classification": transformers.BertForSequenceClassification,
    "none": transformers.BertModel,
}
CONFIGS = {
    "odd sizes": {},
    "one head": {"num_attention_heads": 1, "num_hidden_layers": 1},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "epsilon": {"layer_norm_eps": 0.3},
}
SENTENCES = [
    "That is a happy person",
    "That is a happy dog",
    "Today is a sunny day",
    "The movie was terrible.",
    "A longer sentence, so that the others are padded.",
]
COSINES = {  # published with the data: pairs of the first four SENTENCES
    (0, 1): 0.69458,
    (0, 2): 0.25688,
    (0, 3): 0.00031,
    (1, 2): 0.24906,
    (1, 3): 0.03393,
    (2, 3): -0.03039,
}


def inputs(vocabulary: int, T: int, segments: int) -> dict[str, torch.Tensor]:
    """Everything a BERT can be given, padded at the left and at the right."""
    mask, position_ids = padded(T, left=T // 4, right=T // 3)
    return {
        "input_ids": tokens(vocabulary, 2, T),
        "attention_mask": mask,
        "position_ids": position_ids,
        "token_type_ids": tokens(segments, 2, T, seed=2),
    }


def real(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What belongs to tokens, not to padding; classes belong to the text."""
    return output[mask.bool()] if output.dim() == 3 else output


@pytest.fixture(scope="module", params=[(h, c) for h in CLASSES for c in CONFIGS], ids=str)
def pair(request):
    head, config = request.param
    settings = CONFIGS[config] | ({"num_labels": 3} if head == "classification" else {})
    hf = hf_bert(CLASSES[head], **settings)
    return hf, sibling(hf, head=head)


@torch.no_grad()
def test_small_output_equals_transformers(pair):
    hf, ours = pair
    ids = tokens(101, 2, T)
    oracle = hf(ids, output_attentions=True)
    assert_sharp(oracle.attentions)
    assert_close(ours(ids), oracle[0])


@torch.no_grad()
def test_small_output_equals_transformers_with_all_inputs(pair):
    hf, ours = pair
    batch = inputs(101, T, segments=3)
    mask = batch["attention_mask"]
    assert_close(real(ours(**batch), mask), real(hf(**batch)[0], mask))


def test_small_gradients_equal_transformers(pair):
    hf, ours = pair
    batch = inputs(101, T, segments=3)
    for model in (hf, ours):
        model.zero_grad()
        output = model(**batch)
        output = output if isinstance(output, torch.Tensor) else output[0]
        real(output, batch["attention_mask"]).pow(3).mean().backward()
    assert_same_gradients(ours, hf)


@torch.no_grad()
def test_base_size_masked_lm_equals_transformers(bert_base):
    hf, ours = bert_base
    batch = inputs(30522, 48, segments=2)
    mask = batch["attention_mask"]
    oracle = hf(**batch, output_attentions=True)
    assert_sharp(oracle.attentions)
    assert_close(real(ours["masked-lm"](**batch), mask), real(oracle.prediction_logits, mask))


@torch.no_grad()
def test_base_size_states_and_pooled_equal_transformers(bert_base):
    hf, ours = bert_base
    batch = inputs(30522, 48, segments=2)
    mask = batch["attention_mask"]
    oracle = hf.bert(**batch)
    states = ours["none"](**batch)
    assert_close(real(states, mask), real(oracle.last_hidden_state, mask))
    assert_close(ours["none"].pooled(states)[1:], oracle.pooler_output[1:])


@torch.no_grad()
def test_base_size_classification_equals_transformers(bert_base):
    hf, ours = bert_base
    classifier = ours["classification"].head.classifier
    nn.init.normal_(classifier.bias)
    batch = inputs(30522, 48, segments=2)
    pooled = hf.bert(**batch).pooler_output
    oracle = pooled.double() @ classifier.weight.double().T + classifier.bias.double()
    assert_close(ours["classification"](**batch)[1:], oracle[1:])


@pytest.fixture(scope="module")
def minilm():
    return minigpt.load(minilm_folder())


@torch.no_grad()
def test_pretrained_states_equal_transformers(minilm):
    hf = transformers.BertModel.from_pretrained(minilm_folder(), attn_implementation="eager").eval()
    batch = inputs(30522, 40, segments=2)
    mask = batch["attention_mask"]
    oracle = hf(**batch)
    states = minilm(**batch)
    assert sum(p.numel() for p in minilm.parameters()) == 22_713_216
    assert_close(real(states, mask), real(oracle.last_hidden_state, mask))
    assert_close(minilm.pooled(states)[1:], oracle.pooler_output[1:])


def wordpiece_folder(kind: str):
    folder = minilm_folder() if kind == "tokenizer.json" else DATA / "tokenizers/bert_base_uncased"
    if not folder.exists():
        pytest.skip(f"real data absent: {folder}")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.txt"])
def test_pretrained_sentence_similarities(minilm, files, tmp_path):
    """Mean of the states over the real tokens of a padded batch, normalised."""
    (tmp_path / files).write_bytes((wordpiece_folder(files) / files).read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    first, last = (tokenizer.backend.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    rows = [[first, *tokenizer.encode(text), last] for text in SENTENCES]
    longest = max(map(len, rows))
    assert 7 == min(map(len, rows)) < longest < 20
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    means = (minilm(ids, mask) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    means = nn.functional.normalize(means)
    for (i, j), expected in COSINES.items():
        assert (means[i] @ means[j]).item() == pytest.approx(expected, abs=5e-5), (i, j)


@torch.no_grad()
@pytest.mark.parametrize("attend", [naive_attention, fast_attention])
def test_a_row_of_padding_only_stays_finite(attend):
    ours = sibling(hf_bert())
    for block in ours.blocks:
        block.attention.attend = attend
    mask = torch.ones(2, T)
    mask[0] = 0
    ids = tokens(101, 2, T)
    states = ours(ids, mask)
    assert states.isfinite().all()
    assert_close(states[1:], ours(ids[1:]))


def test_dropout_stands_where_it_stands_in_transformers():
    """The same draws in the same order: embeddings, two in each block, classifier."""
    hf = hf_bert(
        CLASSES["classification"],
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.4,
    )
    ours = sibling(hf).train()
    ids = tokens(101, 2, T)
    torch.manual_seed(5)
    oracle = hf.train()(ids).logits
    torch.manual_seed(5)
    assert_close(ours(ids).detach(), oracle.detach())
    assert (ours.eval()(ids) - oracle).abs().max() > 0.01


def test_attention_dropout_acts_only_while_training():
    ours = sibling(hf_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3))
    ids = tokens(101, 2, T)
    assert torch.equal(ours(ids), ours(ids))
    ours.train()
    assert not torch.equal(ours(ids), ours(ids))


@pytest.mark.parametrize(("given", "expected"), [(None, 0.2), (0.0, 0.0), (0.5, 0.5)])
def test_classifier_dropout_falls_back_to_the_hidden_one(given, expected):
    config = BertConfig(
        vocab_size=9, hidden_size=6, num_hidden_layers=1, num_attention_heads=2,
        hidden_dropout_prob=0.2, classifier_dropout=given,
    )  # fmt: skip
    assert Bert(config, "classification").head.dropout.p == expected


def test_too_long_a_text_is_an_error():
    ours = Bert(BertConfig(vocab_size=9, hidden_size=6, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(ValueError, match="513 tokens exceed the 512 positions"):
        ours(tokens(9, 1, 513))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 770}, "hidden_size 770 is no multiple of num_attention_heads 12"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0"),
        ({"hidden_dropout_prob": -0.1}, r"hidden_dropout_prob is -0\.1"),
        ({"classifier_dropout": 1.5}, r"classifier_dropout is 1\.5"),
        ({"hidden_act": "swish"}, "hidden_act is 'swish'"),
    ],
)
def test_bad_config_is_an_error_that_names_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**settings)
