"""Faults on purpose: each is put into a copy of the code, and some test must fail.

    python -m tests.mutants                    all of them, and the table in docs/mutants.md
    python -m tests.mutants "wrong scale"      one
    python -m tests.mutants --random 60        as many, drawn by chance (tests/random_mutants.py)
    python -m tests.mutants --random 60 peft_lite minigpt/data         the same in these folders

The first part are faults that HF PEFT, loralib, adapters, litgpt and others had or have; the second
are slips of the kind one makes.  A mutant that survives is a test that is missing; of those drawn
by chance some are no faults: `equivalent_mutants.txt` has them, with the reason.  Of those drawn by
chance, the tests that execute the changed line run (tests/executed.py records which); what died is
kept in `.mutants/verdicts.txt` and not tried again.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.executed import executing
from tests.judge import fails_unchanged, first_failure, prepare
from tests.random_mutants import Change, draw, explained, related

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "mutants.md"
VERDICTS = ROOT / ".mutants" / "verdicts.txt"
FATES = ("killed", "explained", "SURVIVES", "timed out", "unclear")
ENOUGH = 0.97  # share of the drawn changes that die or are explained


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` stands once in `file` and becomes `new`; `tests` are run."""

    name: str
    seen: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def mutant(name: str, seen: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, seen, file, old, new, tests)


HERE = "here"
MUTANTS = [
    mutant(
        "a misspelt target is ignored",
        "peft #1959, #3582, #3658",
        "peft_lite/select.py",
        '        if not matched:\n            ends = {s.rsplit(".", 1)[-1] for n in modules',
        "        if not matched and not modules:\n"
        '            ends = {s.rsplit(".", 1)[-1] for n in modules',
        "test_lora",
        "test_select",
    ),
    mutant(
        "an alpha_pattern that matches nothing is ignored",
        "peft #3582",
        "peft_lite/select.py",
        '        if not matched:\n            ends = {s.rsplit(".", 1)[-1] for n in layers',
        '        if not layers:\n            ends = {s.rsplit(".", 1)[-1] for n in layers',
        "test_lora",
        "test_select",
    ),
    mutant(
        "merging into a tied weight",
        "peft #2018",
        "peft_lite/handle.py",
        "if others and not untie:",
        "if others and not untie and False:",
        "test_lora",
    ),
    mutant(
        "nn.MultiheadAttention reads the weight without the change",
        "peft #3774",
        "peft_lite/wrapper.py",
        "new = self.new_weights().get(name) if self.acts else None",
        "new = None",
        "test_drop_in",
    ),
    mutant(
        "a prefix moves the positions of real tokens",
        "peft",
        "peft_lite/prefix.py",
        'if config.form == "peft":\n        for',
        "if config.form:\n        for",
        "test_prefix",
    ),
    mutant(
        "a prefix is hidden from queries beyond the local window",
        HERE,
        "peft_lite/prefix.py",
        'if config.form == "peft" else None\n',
        "if config.form else None\n",
        "test_prefix",
    ),
    mutant(
        "the prefix does not count in the window of PEFT's form",
        HERE,
        "peft_lite/prefix.py",
        'if config.form == "peft" else None\n',
        "if False else None\n",
        "test_interchange",
    ),
    mutant(
        "DoRA's norm ignores alpha / r",
        "adapters 1.2.0",
        "peft_lite/dora.py",
        "return torch.linalg.vector_norm(dense_weight(self.layer) + self.delta(), dim=1)",
        "return torch.linalg.vector_norm(\n"
        "                dense_weight(self.layer) + self.lora_b @ self.lora_a, dim=1)",
        "test_dora",
        "test_interchange",
    ),
    mutant(
        "DoRA's magnitude scales the bias",
        "adapters 1.2.0, torchtune",
        "peft_lite/dora.py",
        "lora_linear(x, W[0], None, A",
        "lora_linear(x, *W, A",
        "test_dora",
        "test_interchange",
    ),
    mutant(
        "DoRA's norm runs over the outputs",
        "peft #2348",
        "peft_lite/dora.py",
        "dense_weight(self.layer) + self.delta(), dim=1)",
        "dense_weight(self.layer) + self.delta(), dim=0)",
        "test_dora",
        "test_interchange",
    ),
    mutant(
        "DoRA's norm of a table runs over the width",
        "peft #2348",
        "peft_lite/dora.py",
        "dense_weight(self.layer) + self.delta(), dim=0)",
        "dense_weight(self.layer) + self.delta(), dim=1)",
        "test_dora",
        "test_interchange",
    ),
    mutant(
        "dropout is not applied in DoRA",
        "peft #1806",
        "peft_lite/dora.py",
        "self.dropout if self.training else 0.0",
        "0.0",
        "test_dora",
    ),
    mutant(
        "the norm of DoRA gets a gradient though it should not",
        HERE,
        "peft_lite/dora.py",
        "        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):\n"
        "            return torch.linalg.vector_norm("
        "dense_weight(self.layer) + self.delta(), dim=1)",
        "        return torch.linalg.vector_norm(dense_weight(self.layer) + self.delta(), dim=1)",
        "test_dora",
    ),
    mutant(
        "DoRA merges the direction without the magnitude",
        "peft #3531",
        "peft_lite/dora.py",
        'return {"weight": gain(self.magnitude, self.norm())[:, None] * v}',
        'return {"weight": v}',
        "test_dora",
    ),
    mutant(
        "keys and values of a prefix are computed once and kept",
        "litgpt #1287",
        "peft_lite/prefix.py",
        "P = self.source.of_layer(self.i).to(k.dtype)",
        "self.kept = getattr(self, 'kept', None)\n"
        "        if self.kept is None:\n"
        "            self.kept = self.source.of_layer(self.i).to(k.dtype)\n"
        "        P = self.kept",
        "test_prefix",
        "test_handle",
        "test_composition",
    ),
    mutant(
        "a second merge adds the update again",
        "loralib",
        "peft_lite/handle.py",
        "if wrapper.merged:\n                    raise",
        "if wrapper.merged is None:\n                    raise",
        "test_lora",
    ),
    mutant(
        "a merged adapter is saved",
        "loralib",
        "peft_lite/handle.py",
        'self._check_unmerged("save")',
        "assert method",
        "test_adapter_files",
    ),
    mutant(
        "unmerging subtracts the update instead of restoring the weight",
        "loralib: bf16 weights drift",
        "peft_lite/wrapper.py",
        "getattr(self.layer, name).data = original",
        "p = getattr(self.layer, name)\n                p.data = p.data + original - p.data",
        "test_lora",
    ),
    mutant(
        "A begins with the rank as its fan-in",
        "LLMs-from-scratch",
        "peft_lite/lora.py",
        "bound = 1 / math.sqrt(in_features)",
        "bound = 1 / math.sqrt(r)",
        "test_lora",
    ),
    mutant(
        "the update is transposed where the layer is square",
        "lit-llama #34, #61",
        "peft_lite/lora.py",
        "        return self.scaling * product(B, A)\n",
        "        delta = self.scaling * product(B, A)\n"
        "        return delta.T if delta.size(0) == delta.size(1) else delta\n",
        "test_lora",
    ),
    mutant(
        "a weighted combination takes alpha / r of rsLoRA adapters",
        "peft #3761",
        "peft_lite/combine.py",
        "(weights[name] * w.scaling, w.layer, *w.factors())",
        "(weights[name] * w.alpha / len(w.lora_a), w.layer, *w.factors())",
        "test_several",
    ),
    mutant(
        "the file of a PiSSA with rsLoRA doubles alpha with the rank",
        "peft #1930",
        "peft_lite/lora.py",
        "alphas_up = math.sqrt(ranks_up) if config.use_rslora else ranks_up",
        "alphas_up = ranks_up",
        "test_starts",
    ),
    mutant(
        "PiSSA subtracts what it started from by large factors",
        HERE,
        "peft_lite/lora.py",
        "return torch.cat([A - A0, A0]), torch.cat([B, B - B0], 1)",
        "return torch.cat([A, A0]), torch.cat([B, -B0], 1)",
        "test_starts",
    ),
    mutant(
        "LoftQ starts without the scaling",
        "peft",
        "peft_lite/loftq.py",
        "A, B = pissa(lost, r, s)",
        "A, B = pissa(lost, r, 1.0)",
        "test_loftq",
    ),
    mutant(
        "LoftQ takes the last iteration, be it worse",
        "peft",
        "peft_lite/loftq.py",
        "if error < least:",
        "if True:",
        "test_loftq",
    ),
    mutant(
        "gradient checkpointing cuts the graph at frozen inputs",
        "peft #137, transformers #42489",
        "minigpt/training/train.py",
        "use_reentrant=False",
        "use_reentrant=True",
        "test_train",
        "test_lora",
    ),
    mutant(
        "the classifier is not saved",
        "peft #310, #577, #1070, #1457, #2898",
        "peft_lite/wrapper.py",
        "return tensors | dict(named_buffers(module))",
        "return {}",
        "test_interchange",
        "test_saved_modules",
    ),
    mutant(
        "missing tensors are not noticed",
        "peft #1323, #2118",
        "peft_lite/files.py",
        '("missing", missing)',
        '("missing", [])',
        "test_adapter_files",
    ),
    mutant(
        "unexpected tensors are not noticed",
        "peft #2118",
        "peft_lite/files.py",
        '("unexpected", unexpected)',
        '("unexpected", [])',
        "test_adapter_files",
    ),
    mutant(
        "a setting without code is read over",
        "peft",
        "peft_lite/fields.py",
        "        if not (name in known | HARMLESS | harmless or _is_unset(value)):",
        "        if False:",
        "test_adapter_files",
    ),
    mutant(
        "the prefix comes in float32 into a bf16 model",
        "peft #869, #2191",
        "peft_lite/prefix.py",
        "of_layer(self.i).to(k.dtype)",
        "of_layer(self.i)",
        "test_prefix",
    ),
    mutant(
        "an adapter in float32 widens the output of a bf16 model",
        "peft #971, #1706, #2421",
        "peft_lite/bottleneck.py",
        "p.to(h.dtype) for p in (self.down",
        "p for p in (self.down",
        "test_bottleneck",
    ),
    mutant(
        "an empty tokenizer is loaded in silence",
        "transformers 5.23",
        "minigpt/data/tokenizer.py",
        "if backend.get_vocab_size() == 0:",
        "if backend.get_vocab_size() < 0:",
        "test_tokenizer",
    ),
    mutant(
        "s = alpha",
        HERE,
        "peft_lite/lora.py",
        "self.scaling = alpha / math.sqrt(r) if rslora else alpha / r",
        "self.scaling = alpha",
        "test_lora",
    ),
    mutant(
        "dropout stays on in evaluation",
        HERE,
        "peft_lite/lora.py",
        "self.dropout if self.training else 0.0",
        "self.dropout",
        "test_lora",
    ),
    mutant(
        "dropout drops without scaling what it keeps",
        HERE,
        "kernels/lora.py",
        "c = scaling / (1 - dropout_p)",
        "c = scaling",
        "test_lora",
    ),
    mutant(
        "the rows of a batch are swapped",
        HERE,
        "peft_lite/handle.py",
        "index = [i for i, row in enumerate(names) if row == name]",
        "index = [len(names) - 1 - i for i, row in enumerate(names) if row == name]",
        "test_several",
    ),
    mutant(
        "switching leaves the other adapter on",
        HERE,
        "peft_lite/handle.py",
        "                self._activate(method, method is chosen)",
        "                self._activate(method, method.active or method is chosen)",
        "test_several",
    ),
    mutant(
        "the base trains along",
        HERE,
        "peft_lite/handle.py",
        "                    p.requires_grad_(False)\n                setattr",
        "                    p.requires_grad_(p.dim() == 1)\n                setattr",
        "test_lora",
        "test_handle",
    ),
    mutant(
        "detaching forgets what was frozen before",
        HERE,
        "peft_lite/handle.py",
        "p.requires_grad_(self.flags.get(n, p.requires_grad))",
        "p.requires_grad_(True)",
        "test_lora",
        "test_handle",
    ),
    mutant(
        "tuned biases stay after detaching",
        HERE,
        "peft_lite/method.py",
        "        if not fold:\n            self.activate(False)\n",
        "",
        "test_handle",
    ),
    mutant(
        "IA3 merges without the bias",
        HERE,
        "peft_lite/ia3.py",
        "if bias is not None:",
        "if bias is None:",
        "test_ia3",
    ),
    mutant(
        "IA3 scales the output of a feed-forward layer",
        HERE,
        "peft_lite/ia3.py",
        "y: Tensor = self.base((self.scale * x).to(x.dtype))",
        "y: Tensor = self.base(x) * self.scale.to(x.dtype)[: self.layer.out_features].sum()",
        "test_ia3",
        "test_interchange",
    ),
    mutant(
        "a bottleneck loses its residual",
        HERE,
        "peft_lite/bottleneck.py",
        "        return h + self.adapter(h)\n",
        "        return self.adapter(h)\n",
        "test_bottleneck",
    ),
    mutant(
        "a parallel adapter reads the output",
        HERE,
        "peft_lite/bottleneck.py",
        "        return h + self.adapter(x)\n",
        "        return h + self.adapter(h)\n",
        "test_bottleneck",
    ),
    mutant(
        "keys and values of a prefix are swapped",
        HERE,
        "peft_lite/prefix.py",
        "P_k, P_v = P.unflatten",
        "P_v, P_k = P.unflatten",
        "test_prefix",
        "test_interchange",
    ),
    mutant(
        "every layer gets the first layer's prefix",
        HERE,
        "peft_lite/prefix.py",
        "self.table.unflatten(1, (self.layers, -1))[:, i]",
        "self.table.unflatten(1, (self.layers, -1))[:, 0]",
        "test_prefix",
        "test_interchange",
    ),
    mutant(
        "a prompt is added at every step of a generation",
        HERE,
        "peft_lite/prompt.py",
        "        if start:",
        "        if True:",
        "test_prompt",
    ),
    mutant(
        "the tokens keep their positions under a prompt",
        HERE,
        "peft_lite/prompt.py",
        "position_ids = position_ids + K",
        "position_ids = position_ids + 0",
        "test_prompt",
        "test_interchange",
    ),
    mutant(
        "the logits of a prompt shift the labels",
        HERE,
        "minigpt/models/gpt_neo.py",
        "self.final_norm(x[:, T - input_ids.size(1) :])",
        "self.final_norm(x[:, : input_ids.size(1)])",
        "test_prompt",
        "test_interchange",
    ),
    mutant(
        "padding hides the prompt",
        HERE,
        "minigpt/models/architecture.py",
        "F.pad(attention_mask, (prompt.length, 0), value=1)",
        "F.pad(attention_mask, (prompt.length, 0), value=0)",
        "test_prompt",
        "test_interchange",
    ),
    mutant(
        "A of a table is read by columns of another row",
        HERE,
        "peft_lite/lora.py",
        "F.embedding(ids, self.lora_a.T,",
        "F.embedding(ids.flip(-1), self.lora_a.T,",
        "test_lora_embedding",
        "test_interchange",
    ),
    mutant(
        "A's gradient comes from inputs that were dropped",
        HERE,
        "kernels/lora.py",
        "da = ds.T @ (x if bits is None else x * unpack(bits, x.size(1)))",
        "da = ds.T @ x",
        "test_kernels_lora",
    ),
    mutant(
        "the fused product skips a layer's hooks",
        HERE,
        "peft_lite/lora.py",
        "if base._forward_hooks or base._forward_pre_hooks or",
        "if",
        "test_base_layers",
    ),
    mutant(
        "a layer with a forward pass of its own is computed from its weight",
        HERE,
        "peft_lite/lora.py",
        "if kind.forward not in (nn.Linear.forward,",
        "if kind is None and kind.forward not in (nn.Linear.forward,",
        "test_base_layers",
    ),
    mutant(
        "the fused product skips another method that is active",
        HERE,
        "peft_lite/lora.py",
        "        if base.acts:\n            return None\n",
        "",
        "test_base_layers",
    ),
    mutant(
        "an update is merged into a layer that does more than its weight",
        HERE,
        "peft_lite/handle.py",
        "if obstacle := merge_obstacle(wrapper.layer):",
        "if obstacle := None:",
        "test_base_layers",
    ),
    mutant(
        "the padding row of a table trains",
        HERE,
        "peft_lite/lora.py",
        "F.embedding(ids, self.lora_a.T, self.layer.padding_idx)",
        "F.embedding(ids, self.lora_a.T)",
        "test_base_layers",
    ),
    mutant(
        "a layer of few rows decodes without s",
        HERE,
        "kernels/lora.py",
        "a @ columns, alpha=s)",
        "a @ columns)",
        "test_kernels_lora",
    ),
    mutant(
        "the kernel masks another row's elements",
        HERE,
        "kernels/lora_triton.py",
        "byte = tl.load(bits_ptr + m[:, None] * bytes + i[None, :]",
        "byte = tl.load(bits_ptr + m[:, None] * bytes + bytes + i[None, :]",
        "test_kernels_lora",
    ),
    mutant(
        "the kernel takes the halves of a byte in turn",
        HERE,
        "kernels/nf4_triton.py",
        "q = tl.interleave(byte >> 4, byte & 15)",
        "q = tl.interleave(byte & 15, byte >> 4)",
        "test_nf4_triton",
    ),
    mutant(
        "few rows are multiplied by blocks of another row",
        HERE,
        "kernels/nf4_triton.py",
        "g = n[:, None] * (K // NUMBERS) + column[None, :]",
        "g = n[:, None] * tl.cdiv(K, 2 * NUMBERS) * 2 + column[None, :]",
        "test_nf4_triton",
    ),
    mutant(
        "what lies beyond a tensor's end is summed",
        HERE,
        "kernels/update_triton.py",
        "g = tl.load(g_ptr + i, mask=i < length, other=0.0)",
        "g = tl.load(g_ptr + i, mask=i < length, other=0.1)",
        "test_update",
    ),
    mutant(
        "a step that is skipped counts",
        HERE,
        "kernels/update_triton.py",
        "tl.store(t_ptr, tl.load(t_ptr) - 1)",
        "tl.store(t_ptr, tl.load(t_ptr))",
        "test_update",
    ),
    mutant(
        "SGD clips as AdamW does",
        HERE,
        "kernels/update.py",
        'clip = 1 / (norm / group["max_norm"]).clamp(min=1)',
        'clip = (group["max_norm"] / (norm + 1e-2)).clamp(max=1)',
        "test_update",
    ),
    mutant(
        "the second moment is corrected with the first beta",
        HERE,
        "kernels/update_triton.py",
        "tl.exp(t * tl.log(tl.maximum(beta2, 1e-300)))",
        "tl.exp(t * tl.log(tl.maximum(beta1, 1e-300)))",
        "test_update",
    ),
    mutant(
        "an address that changed is not noticed",
        HERE,
        "kernels/update_triton.py",
        "if rows != self.rows:",
        "if len(rows) != len(self.rows):",
        "test_update",
    ),
    mutant(
        "AdamW's fused kernel takes tensors of any strides",
        "torch",
        "kernels/update.py",
        "if t.dtype != dtype or not t.is_contiguous():",
        "if t.dtype != dtype:",
        "test_update",
    ),
    mutant(
        "a transposed gradient is read as it lies in memory",
        "torch",
        "kernels/update.py",
        "Entry(p, p.grad.contiguous(), group)",
        "Entry(p, p.grad, group)",
        "test_update",
    ),
    mutant(
        "a loaded state replaces the tensors of the old one",
        "torch",
        "kernels/update.py",
        "self.state[p] = self.state.get(p) or fresh_state(p, self.memory)",
        "self.state[p] = fresh_state(p, self.memory)",
        "test_update",
    ),
    mutant(
        "the window is one token too wide",
        HERE,
        "minigpt/models/attention.py",
        "mask = mask & (k > q - window)",
        "mask = mask & (k > q - window - 1)",
        "test_attention",
    ),
    mutant(
        "the loss mask is off by one",
        HERE,
        "minigpt/objectives/supervised.py",
        "labels = tokens[1:].masked_fill(~torch.tensor(mine[1:]), IGNORED)",
        "labels = tokens[1:].masked_fill(~torch.tensor(mine[:-1]), IGNORED)",
        "test_supervised",
    ),
    mutant(
        "padding that is the end of a text hides the end of an answer",
        "trl #976, #6357",
        "minigpt/objectives/supervised.py",
        "    return Example(tokens[:-1], labels)",
        "    labels = labels.masked_fill(labels == (tokenizer.end_of_text or 0), IGNORED)\n"
        "    return Example(tokens[:-1], labels)",
        "test_supervised",
    ),
    mutant(
        "a text begins with its first token twice",
        "trl",
        "minigpt/data/tokenizer.py",
        "            return self.backend.encode(text, add_special_tokens=False)\n",
        "            return self.backend.encode(text, add_special_tokens=True)\n",
        "test_supervised",
    ),
    mutant(
        "the positions of a packed row go on",
        "trl",
        "minigpt/data/packing.py",
        "numbers[b, piece], places[b, piece] = number, torch.arange(len(example))",
        "numbers[b, piece], places[b, piece] = number, torch.arange(start, piece.stop)",
        "test_packing",
    ),
    mutant(
        "packed rows see each other",
        "trl #3067",
        "minigpt/models/attention.py",
        "mask = mask & (of_key != 0) & ((of_key == of_query) | (of_query == 0))",
        "mask = mask & (of_key != 0) & (of_query >= 0)",
        "test_attention",
        "test_packing",
    ),
    mutant(
        "a row with a fault is left out without a word",
        HERE,
        "minigpt/data/conversations.py",
        "            faults.append(str(error))",
        "            str(error)",
        "test_conversations",
    ),
    mutant(
        "a row without room in the last window is lost",
        HERE,
        "minigpt/data/packing.py",
        "    return [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]",
        "    return [windows[i : i + batch_size] for i in range(0, len(windows) - 1, batch_size)]",
        "test_packing",
    ),
    mutant(
        "a policy's loss is divided by its padding, too",
        "trl #6369",
        "minigpt/objectives/reinforcement.py",
        'batch["weights"], int((labels != IGNORED).sum()))',
        'batch["weights"], labels.numel())',
        "test_rounds",
    ),
    mutant(
        "a completion's end token is not counted",
        "trl #6879",
        "minigpt/training/rollouts.py",
        "real = end.cumsum(1) - end.long() == 0",
        "real = end.cumsum(1) == 0",
        "test_rollouts",
    ),
    mutant(
        "the divergence has the other sign",
        HERE,
        "minigpt/objectives/policy.py",
        "    return logprobs - reference",
        "    return reference - logprobs",
        "test_enumeration",
    ),
    mutant(
        "the reference drops out",
        HERE,
        "minigpt/objectives/reference.py",
        "torch.no_grad(), mode(model, training=False), handle.enabled(False)",
        "torch.no_grad(), handle.enabled(False)",
        "test_rollouts",
    ),
    mutant(
        "a token that pads is taken for padding wherever it stands",
        "trl #976, #6357",
        "minigpt/training/rollouts.py",
        "attention_mask=torch.cat([mask, real.to(mask.dtype)], 1)",
        "attention_mask=(rows != 0).to(mask.dtype)",
        "test_rollouts",
    ),
    mutant(
        "the baseline of a prompt comes from others, too",
        HERE,
        "minigpt/objectives/reinforcement.py",
        "leave_one_out(round.rewards(o).view(-1, o.generations)).flatten()",
        "leave_one_out(round.rewards(o)[None]).flatten()",
        "test_rounds",
    ),
    mutant(
        "the log-probabilities of sampling are computed again at each update",
        HERE,
        "minigpt/objectives/reinforcement.py",
        'clipped_surrogate(logprobs - batch["old_logprobs"], A, o.clip)',
        "clipped_surrogate(logprobs - logprobs.detach(), A, o.clip)",
        "test_rounds",
    ),
    mutant(
        "a conversation begins twice",
        "transformers",
        "minigpt/data/preferences.py",
        "ids = self.tokenizer.encode(self._text(",
        "ids = self.tokenizer.start + self.tokenizer.encode(self._text(",
        "test_preferences",
    ),
    mutant(
        "the score stands after the end",
        "trl #3750, #5338",
        "minigpt/objectives/advantages.py",
        "last = mask.long().sum(1, keepdim=True) - 1",
        "last = mask.long().sum(1, keepdim=True).clamp(max=mask.size(1) - 1)",
        "test_enumeration",
    ),
    mutant(
        "there is a value after the end",
        HERE,
        "minigpt/objectives/advantages.py",
        "torch.cat([values * mask, values.new_zeros(B, 1)], 1)",
        "torch.cat([values, values.new_zeros(B, 1)], 1)",
        "test_enumeration",
    ),
    mutant(
        "a completion's own reward is part of its baseline",
        HERE,
        "minigpt/objectives/advantages.py",
        "others = (rewards.sum(1, keepdim=True) - rewards) / (G - 1)",
        "others = rewards.mean(1, keepdim=True)",
        "test_enumeration",
    ),
]


def file_of(test: str) -> Path:
    """The one file of tests of that name."""
    (file,) = (ROOT / "tests").rglob(f"{test}.py")
    return file


def killer(mutant: Mutant) -> str | None:
    """The first test that fails with the fault in the code; None: it survives."""
    text = (ROOT / mutant.file).read_text().replace(mutant.old, mutant.new)
    tests = [str(file_of(test).relative_to(ROOT)) for test in mutant.tests]
    return first_failure(mutant.file, text, tests)


def fate(change: Change) -> str:
    """What becomes of a change drawn by chance, in words that begin with one of FATES."""
    likely = related(change.file)
    tests = executing(change) or likely  # it runs in processes of the tests alone
    first = [test for test in tests if test.partition("::")[0] in likely[:2]]
    steps = [step for step in (first, [t for t in tests if t not in {*first}]) if step]
    failures = (first_failure(change.file, change.applied(), step) for step in steps)
    try:
        test = next(filter(None, failures), None)
    except TimeoutError:
        return "timed out"
    except RuntimeError as error:
        return f"unclear: {' '.join(str(error).split())}"
    if test is None:
        return f"SURVIVES {len(tests)} tests"
    if "::" in test and fails_unchanged(test):
        return f"unclear: {test} fails without it"
    return f"killed by {test}"


def by_chance(changes: Sequence[Change], jobs: int) -> int:
    """Puts changes drawn by chance into the code, but for those that are known to die.  Status 1:
    too many survive.
    """
    reasons, known = explained(), verdicts()
    became = {c: f"explained: {reasons[c.row]}" for c in changes if c.row in reasons}
    became |= {c: known[c.place] for c in changes if c not in became and c.place in known}
    prepare()
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        running = {pool.submit(fate, change): change for change in changes if change not in became}
        for done in as_completed(running):
            change = running[done]
            became[change] = done.result()
            print(f"{change}: {became[change]}", flush=True)
            if became[change].startswith("killed"):
                VERDICTS.parent.mkdir(exist_ok=True)
                with VERDICTS.open("a") as file:
                    file.write(f"{change.place}\t{became[change]}\n")
    counts = {fate: sum(b.startswith(fate) for b in became.values()) for fate in FATES}
    print(", ".join(f"{count} {fate}" for fate, count in counts.items()))
    return int(counts["killed"] + counts["explained"] < ENOUGH * len(changes))


def verdicts() -> dict[str, str]:
    """The changes that died, by their places, in this run or earlier ones."""
    lines = VERDICTS.read_text().splitlines() if VERDICTS.exists() else []
    return dict(line.split("\t", 1) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("name", nargs="*", help="mutants, or files, to try (default: all)")
    parser.add_argument("--random", type=int, metavar="N", help="try N changes drawn by chance")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    if given.random is not None:
        return by_chance(draw(given.random, given.seed, given.name or [""]), given.jobs)
    chosen = [m for m in MUTANTS if not given.name or m.name in given.name]
    if unknown := set(given.name) - {m.name for m in MUTANTS}:
        raise SystemExit(f"no mutant is called {sorted(unknown)}")
    prepare()
    with ProcessPoolExecutor(given.jobs, get_context("fork")) as pool:
        killers = []
        for mutant, test in zip(chosen, pool.map(killer, chosen), strict=True):
            print(f"{mutant.name}: {test or 'SURVIVES'}", flush=True)
            killers.append(test)
    if not given.name:
        rows = zip(chosen, killers, strict=True)
        TABLE.write_text(table([(m, test) for m, test in rows]))
    return int(any(test is None for test in killers))


def table(rows: list[tuple[Mutant, str | None]]) -> str:
    lines = [
        "# Mutants",
        "",
        "Each fault was put into the code on purpose (`make mutants`), and a test failed. Those "
        "with a source",
        "are faults that other libraries had or have.",
        "",
        "| fault | seen in | file | first test that fails |",
        "|---|---|---|---|",
    ]
    for m, test in rows:
        shown = "**survives**" if test is None else f"`{test.removeprefix('tests/')}`"
        lines.append(f"| {m.name} | {m.seen} | `{m.file}` | {shown.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    raise SystemExit(main())
