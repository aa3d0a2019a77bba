"""The chunked loss against cross-entropy over all the logits."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_lite
from minigpt import Bert, BertConfig
from minigpt.data.text import moved
from minigpt.objectives.causal import language_model_loss
from minigpt.objectives.cross_entropy import ROWS, chunked_cross_entropy
from minigpt.objectives.masked import masked_language_model_loss
from tests import tiny

M, D, V = 13, 8, 29
DTYPES = (torch.float32, torch.float64)
ROUNDINGS = 64  # of sums over M, D and V terms


def full_cross_entropy(x: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(x).flatten(0, -2), labels.flatten())


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    x = (3 * torch.randn(M, D, dtype=dtype)).requires_grad_()
    labels = torch.randint(V, (M,))
    labels[[0, 4, 5, 6, 7]] = -100  # 4 to 7: a whole chunk of four rows
    return x, nn.Linear(D, V, dtype=dtype), labels


def assert_same(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values and equal gradients of all `inputs`, to rounding."""
    assert tiny.gap(loss, expected) < ROUNDINGS
    gradients = torch.autograd.grad(loss, inputs)
    for g, want in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert want.abs().max() > 0
        assert tiny.gap(g, want) < ROUNDINGS


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5, M, 100])
def test_equals_full_cross_entropy(rows: int, dtype: torch.dtype) -> None:
    x, head, labels = problem(dtype)
    loss = chunked_cross_entropy(x, head, labels, rows)
    assert_same(loss, full_cross_entropy(x, head, labels), [x, *head.parameters()])


def test_more_rows_than_a_chunk_of_the_default_size() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(2, ROWS - 1, D).requires_grad_(), torch.randint(V, (2, ROWS - 1))
    head = nn.Linear(D, V)
    loss = chunked_cross_entropy(x, head, labels)
    assert_same(loss, full_cross_entropy(x, head, labels), [x, *head.parameters()])


@pytest.mark.parametrize("label", [-1, -99, -101, V, 2**40])
@pytest.mark.parametrize("place", [0, M - 1])
def test_a_label_that_is_none_is_refused(label: int, place: int) -> None:
    x, head, labels = problem()
    labels[place] = label
    with pytest.raises(
        ValueError, match=rf"^a label is {label}, must be in \[0, {V}\), or -100 for"
    ):
        chunked_cross_entropy(x, head, labels, 4)


@pytest.mark.parametrize("loss", [language_model_loss, masked_language_model_loss])
def test_objectives_refuse_a_negative_label(loss: Callable[..., Tensor]) -> None:
    config = BertConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = Bert(config, "masked-lm")
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    batch["labels"] = torch.tensor([[1, 2, -1], [3, -100, 0]])
    with pytest.raises(ValueError, match=r"^a label is -1, must be in"):
        loss(model, batch)
    with pytest.raises(ValueError, match=r"^a label is -1, must be at least 0, or -100 for none$"):
        moved(batch, torch.device("meta"))  # before it leaves the CPU
    batch["labels"][0, 2] = -100
    assert loss(model, batch).isfinite()
    assert moved(batch, torch.device("meta"))["labels"].is_meta


@pytest.mark.parametrize("shape", [(M + 1,), (M - 1,), (1,), (M, 1), (1, M)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    x, head, _ = problem()
    with pytest.raises(ValueError, match=r"^labels are \[.*\], the states \[13\]$"):
        chunked_cross_entropy(x, head, torch.zeros(shape, dtype=torch.int64))


def test_parameters_with_one_gradient_do_not_share_its_sum() -> None:
    class TwoBiases(nn.Linear):
        def __init__(self) -> None:
            super().__init__(D, V)
            self.second = nn.Parameter(torch.randn(V))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.second

    x, _, labels = problem()
    head = TwoBiases()
    loss = chunked_cross_entropy(x, head, labels, 1)
    assert_same(loss, full_cross_entropy(x, head, labels), [x, *head.parameters()])


def test_upstream_gradient_scales_every_gradient() -> None:
    x, head, labels = problem(torch.float64)
    inputs = [x, *head.parameters()]
    loss = 2 * chunked_cross_entropy(x, head, labels, 4) + 1
    assert_same(loss, 2 * full_cross_entropy(x, head, labels) + 1, inputs)


def test_frozen_head_gets_no_gradient() -> None:
    x, head, labels = problem()
    head.requires_grad_(False)
    loss = chunked_cross_entropy(x, head, labels, 4)
    assert_same(loss, full_cross_entropy(x, head, labels), [x])
    loss = chunked_cross_entropy(x, head, labels, 4)
    loss.backward()
    assert head.weight.grad is None


def test_partly_frozen_head_over_frozen_states() -> None:
    x, head, labels = problem()
    x.requires_grad_(False)
    head.weight.requires_grad_(False)
    loss = chunked_cross_entropy(x, head, labels, 4)
    assert_same(loss, full_cross_entropy(x, head, labels), [head.bias])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_head_runs_without_them(mode: type[torch.no_grad]) -> None:
    x, head, labels = problem()
    expected = full_cross_entropy(x, head, labels)
    graphs = []
    head.register_forward_hook(lambda module, inputs, z: graphs.append(z.requires_grad))
    with mode():
        loss = chunked_cross_entropy(x * 1, head, labels, 4)
    assert tiny.gap(loss, expected.detach()) < ROUNDINGS
    assert not loss.requires_grad
    assert graphs == [False] * 2  # 8 of 13 rows have a label


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_on_the_head(dtype: torch.dtype) -> None:
    model = tiny.gpt_neo().to(dtype)
    peft_lite.attach(model, peft_lite.LoraConfig(["head", "query"], r=3, lora_alpha=5))
    for p in trained(model):
        nn.init.normal_(p, std=0.2)
    batch = tiny.batch(0)
    assert len(trained(model)) == 6
    loss = language_model_loss(model, batch)
    assert_same(loss, tiny.full_loss(model, batch), trained(model))


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_neo_with_all_parameters(tied: bool) -> None:
    model = tiny.gpt_neo(tie_word_embeddings=tied).double()
    assert (model.head.weight is model.embeddings.token.weight) == tied
    batch = tiny.batch(0)
    loss = language_model_loss(model, batch)
    assert_same(loss, tiny.full_loss(model, batch), trained(model))


def test_bert_masked_language_head_with_bias_and_padding() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        max_position_embeddings=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = Bert(config, "masked-lm").double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    batch = tiny.batch(0, ignored=0.6)
    mask = torch.ones_like(batch["labels"])
    mask[1, 6:] = 0
    batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    inputs = [p for n, p in model.named_parameters() if n not in UNREAD]
    loss = language_model_loss(model, batch)
    assert_same(loss, tiny.full_loss(model, batch), inputs)


UNREAD = {f"blocks.{i}.attention.key.bias" for i in range(2)}  # softmax cancels it: gradient 0


def test_bf16_autocast_stays_close_to_float32() -> None:
    x, head, labels = problem()
    inputs = [x, *head.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(x, head, labels, 4)
    expected = full_cross_entropy(x, head, labels)
    eps = torch.finfo(torch.bfloat16).eps
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 2 * eps * expected
    gradients = torch.autograd.grad(loss, inputs)
    for g, want in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert g.dtype == torch.float32
        assert (g - want).abs().max() < 2 * eps * want.abs().max()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_only_rows_with_a_label_go_through_the_head(share: float) -> None:
    torch.manual_seed(0)
    x, head = torch.randn(2, 50, D, dtype=torch.float64).requires_grad_(), nn.Linear(D, V).double()
    labels = torch.randint(V, (2, 50)).masked_fill(torch.rand(2, 50) >= share, -100)
    read: list[Tensor] = []
    head.register_forward_hook(lambda module, inputs, z: read.append(inputs[0].detach()))
    loss = chunked_cross_entropy(x, head, labels, 16)
    assert torch.equal(torch.cat([*read, x[:0, 0]]), x[labels != -100])
    if share == 0:
        loss.backward()  # as a mean of nothing, not as an error
        assert loss.isnan()
    else:
        assert_same(loss, full_cross_entropy(x, head, labels), [x, *head.parameters()])
        (dx,) = torch.autograd.grad(chunked_cross_entropy(x, head, labels, 16), x)
        assert torch.equal(dx == 0, (labels == -100)[..., None].expand_as(dx))


class LargestLogits(TorchDispatchMode):
    """The most rows that any tensor with V columns has, but for the head's own."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight.numel()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.dim() and t.size(-1) == V and t.numel() != self.weight:
                self.rows = max(self.rows, t.numel() // V)
        return out


def most_rows(loss: object, M: int) -> int:
    head = nn.Linear(D, V)
    x = torch.randn(M, D).requires_grad_()
    with LargestLogits(head) as largest:
        loss(x, head, torch.zeros(M, dtype=torch.long)).backward()  # type: ignore[operator]
    return largest.rows


def test_never_more_than_a_chunk_of_logits() -> None:
    def chunked(x: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(x, head, labels, 16)

    assert most_rows(full_cross_entropy, 100) == 100  # the measure sees what it should
    assert most_rows(chunked, 100) == most_rows(chunked, 300) == 16


def test_nothing_with_v_columns_is_kept_for_the_backward_pass() -> None:
    def kept(loss: object) -> list[torch.Size]:
        x, head, labels = problem()
        weight, shapes = head.weight.untyped_storage().data_ptr(), []

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() != weight and t.dim() and t.size(-1) == V:
                shapes.append(t.shape)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss(x, head, labels)  # type: ignore[operator]
        return shapes

    assert set(kept(full_cross_entropy)) == {(M, V)}
    assert kept(lambda *a: chunked_cross_entropy(*a, 4)) == []


def test_states_and_head_are_left_as_they_were() -> None:
    x, head, labels = problem()
    before = copy.deepcopy((x, head.state_dict(), labels))
    chunked_cross_entropy(x, head, labels, 4).backward()
    assert torch.equal(x, before[0])
    assert torch.equal(labels, before[2])
    assert all(torch.equal(head.state_dict()[name], t) for name, t in before[1].items())
    assert head.weight.grad is not None


def test_the_tied_gradient_is_added_up_in_place() -> None:
    """A sum that is a new tensor would be one more of the model's largest at the peak of memory."""
    model = tiny.gpt_neo()
    loss = language_model_loss(model, tiny.batch(0))
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profiler:
        loss.backward()
    shape = list(model.embeddings.token.weight.shape)
    sums = {e.name for e in profiler.events() if e.input_shapes[:2] == [shape, shape]}
    assert "aten::add_" in sums
    assert "aten::add" not in sums
