"""`gated.report` and `explain`: what runs how and why, and what it saves.

Shapes: B samples, S positions, D hidden size, V vocabulary, N active positions, L the most of a sample.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_models import VOCABULARY, build
from tiers import exhaustive, tiers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import regate_fx
from regate_fx.errors import InvalidInput, NotGateable
from regate_fx.report import BatchTokens, Cost, Report

B, S, D, V = 2, 10, 16, 31

# Of one token in a layer of the small Llama: q and o 32 x 32, k and v 32 x 16, three matrices 32 x 48.
LLAMA_ROW = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
# Of one (query, key) pair: 4 heads of width 8, for the scores and for the values.
LLAMA_PAIR = 2 * 4 * (8 + 8)
# Mixtral has a router to 4 experts in place of the three matrices, and runs two experts of that size.
MIXTRAL_ROW = LLAMA_ROW + 2 * (3 * 32 * 48 + 32 * 4)
HEAD_ROW = 2 * 32 * VOCABULARY


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class CausalConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(F.layer_norm(x, (D,)))
        return x


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def padded_labels_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())


class HandMade(nn.Module):
    """A language model that no library knows."""

    def __init__(self, *layers: Layer, loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(D, V, bias=False)
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return CausalLMOutputWithPast(None if labels is None else self.loss(logits, labels), logits)


class Untidy(HandMade):
    """Breaks the graph, draws random numbers and changes itself whenever it runs."""

    def __init__(self) -> None:
        super().__init__(Layer(Attention()), Layer(Attention()), loss=padded_labels_loss)
        self.register_buffer("seen", torch.zeros(()))
        self.runs = 0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutputWithPast:
        self._count()
        return super().forward(input_ids, labels)

    @torch._dynamo.disable
    def _count(self) -> None:
        LOG.append(self.training)
        self.seen += torch.rand(())
        self.runs += 1
        self.cache = torch.rand(3) * random.random() * np.random.rand()


LOG: list[bool] = []


def ids(high: int = V, batch: int = B, length: int = S) -> Tensor:
    return torch.randint(3, high, (batch, length), generator=torch.Generator().manual_seed(0))


def padded() -> Tensor:
    """int64 [B, S]: S tokens in the first sample, 6 in the second."""
    return (torch.arange(S) < torch.tensor([[S], [6]])).long()


def mask(*active: int) -> Tensor:
    """bool [B, S] with so many leading positions of each sample active."""
    return torch.arange(S) < torch.tensor(active)[:, None]


def gate(model: nn.Module) -> Any:
    return regate_fx.compile(model, backend="eager", validate=False)


def printed(report: Report, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report)
    return console.export_text()


@pytest.mark.parametrize(
    ("name", "row", "attention"),
    [
        ("llama", LLAMA_ROW, "model"),
        ("mixtral", MIXTRAL_ROW, "auto"),
        pytest.param("gemma2", LLAMA_ROW, "auto", marks=exhaustive),
    ],
)
def test_flops_counted_by_hand(name: str, row: int, attention: Any) -> None:
    gated = regate_fx.compile(build(name), backend="eager", validate=False, attention=attention)
    tokens = ids(VOCABULARY)
    gated(input_ids=tokens, attention_mask=padded(), labels=tokens.clone(), token_mask=mask(3, 5))
    report = gated.report
    assert report.batch == BatchTokens(S, (S, 6), (3, 5))
    # The model's own operators compute as many slots for each sample.
    pairs = 2 * 5**2 if attention == "model" else 3**2 + 5**2
    layer = Cost(
        dense=2 * S * row + 2 * S**2 * LLAMA_PAIR,
        gated=8 * row + pairs * LLAMA_PAIR,
    )
    assert [layer.cost for layer in report.layers] == [layer, layer]
    assert report.head == Cost(2 * S * HEAD_ROW, 8 * HEAD_ROW)
    assert report.cost.dense == report.before.dense + 2 * layer.dense + report.head.dense
    assert report.active_share == 8 / 16
    assert report.uncounted == 0

    # The next call is another batch, and the graph of the first one.
    shorter = {
        "input_ids": tokens[:, :7].clone(),
        "labels": tokens[:, :7].clone(),
        "attention_mask": torch.ones(B, 7, dtype=torch.int64),
    }
    gated(**shorter, token_mask=mask(7, 7)[:, :7])
    again = gated.report
    assert again.traces == report.traces
    assert again.active_share == 1
    square = 14 * row + 2 * 7**2 * LLAMA_PAIR
    assert [layer.cost for layer in again.layers] == [Cost(square, square)] * 2


@pytest.mark.parametrize("name", tiers(["llama", "gemma2", "mixtral"], "mixtral"))
def test_other_batches_cost_what_a_call_with_them_reports(name: str) -> None:
    gated = gate(build(name))
    reports = []
    for lengths in ((4, 7, 2), (10, 10), (1, 9)):
        tokens = ids(VOCABULARY, len(lengths))
        gated(input_ids=tokens, labels=tokens.clone(), token_mask=mask(*lengths))
        reports.append(gated.report)
    for report in reports:
        assert [report.cost_of(other.batch) for other in reports] == [other.cost for other in reports]
    assert Report().cost_of is None


@exhaustive
def test_one_sample_has_its_share_of_the_flops() -> None:
    """Dynamo makes the number of samples a constant where it is one."""
    tokens = ids(VOCABULARY, batch=1)
    gated = gate(build("llama"))
    gated(input_ids=tokens, labels=tokens, token_mask=mask(4))
    alone = Cost(S * LLAMA_ROW + S**2 * LLAMA_PAIR, 4 * LLAMA_ROW + 4**2 * LLAMA_PAIR)
    assert gated.report.layers[0].cost == alone
    both = torch.cat([tokens, tokens])
    gated(input_ids=both, labels=both, token_mask=mask(4, 4))
    assert gated.report.layers[0].cost == alone + alone


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_layer_and_reason_is_in_the_table(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HandMade(Layer(Attention()), Layer(Attention(), CausalConvolution()), Layer(Attention()))
    report = regate_fx.explain(model, input_ids=ids())
    text = printed(report, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    rows: dict[str, list[str]] = {}
    for line in filter(str.split, text.splitlines()[2:]):
        rows.setdefault(line.split()[0], line.split())
    assert [rows[str(index)][1] for index in range(3)] == ["varlen", "dense", "varlen"]
    assert rows["1"][-2:] == ["0.0%", "1"]
    assert "aten.conv1d" in text
    assert "test_report.py:" in text
    assert "Expected active share: 50.0%" in text
    monkeypatch.setenv("COLUMNS", str(width))
    assert [line.rstrip() for line in str(report).splitlines()] == [
        line.rstrip() for line in text.rstrip("\n").splitlines()
    ]


def test_a_layer_that_mixes_tokens_is_dense_and_named() -> None:
    model = HandMade(Layer(Attention()), Layer(Attention(), CausalConvolution()), Layer(Attention()))
    gated = gate(model)
    gated(input_ids=ids(), labels=ids(), token_mask=mask(5, 5))
    for report in (gated.report, regate_fx.explain(model, input_ids=ids())):
        dense = report.layers[1]
        assert (dense.kind, report.gated, report.refusals) == ("dense", 2, [])
        assert "aten.conv1d" in dense.reason
        assert dense.source.startswith("test_report.py:")
        assert "self.conv(x.transpose(1, 2))" in dense.source
        convolution = 2 * B * (S + 2) * D * D * 3
        attention = 2 * B * S * 4 * D * D + 2 * B * S**2 * 2 * D
        assert dense.cost == Cost(attention + convolution, attention + convolution)
        assert report.layers[0].cost.dense == attention


def test_a_slower_layout_is_named_with_its_cause() -> None:
    report = regate_fx.explain(build("bloom"), input_ids=ids(VOCABULARY))
    for layer in report.layers:
        reason = "its attention is written by hand: one operator cannot do what aten.view does here"
        assert (layer.kind, layer.reason) == ("compact", reason)
        assert layer.source.startswith("modeling_bloom.py:")
        assert "alibi.reshape" in layer.source


@pytest.mark.parametrize("name", tiers(["mistral", "gpt_neox", "bloom"], "bloom"))
def test_explain_and_training_tell_the_same(name: str) -> None:
    model = build(name)
    gated = gate(model)
    tokens = ids(VOCABULARY)
    batch = {
        "input_ids": tokens,
        "attention_mask": padded(),
        "labels": tokens.masked_fill(padded() == 0, -100),
    }
    gated(**batch, token_mask=mask(5, 3))
    explained = regate_fx.explain(model, **batch)
    trained = gated.report
    assert explained.batch == trained.batch
    assert explained.layers == trained.layers
    assert (explained.before, explained.head) == (trained.before, trained.head)


def test_the_expected_share_follows_the_labels() -> None:
    model, tokens = HandMade(Layer(Attention())), ids()
    labels = tokens.masked_fill(~mask(4, 2), -100)
    counted = regate_fx.explain(model, input_ids=tokens, labels=labels, keep=0.25)
    assert counted.active_share == pytest.approx(1 - 6 / 20 * 0.75)
    # Of 4 and 2 labels the score keeps the best 1 (a quarter of each, rounded up).
    assert counted.batch == BatchTokens(S, (S, S), (7, 9))
    given = regate_fx.explain(model, input_ids=tokens, labels=labels, output_share=0.4)
    assert given.active_share == pytest.approx(0.8)
    assert given.batch == BatchTokens(S, (S, S), (8, 8))
    assumed = regate_fx.explain(model, input_ids=tokens, keep=0.1)
    assert assumed.active_share == pytest.approx(0.1)
    assert assumed.batch == BatchTokens(S, (S, S), (1, 1))


@pytest.mark.parametrize(("name", "value"), [("keep", 0.0), ("keep", 1.5), ("output_share", -0.1)])
def test_a_share_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=f"{name}: expected a share of at most 1, got {value}"):
        regate_fx.explain(HandMade(), input_ids=ids(), **{name: value})


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "versions": [value._version for value in model.state_dict(keep_vars=True).values()],
        "gradients": {name: copy.deepcopy(value.grad) for name, value in model.named_parameters()},
        "attributes": {
            name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in model.named_modules()
        },
        "hooks": [dict(module._forward_pre_hooks) for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        before, after = list(before.values()), list(after.values())
    if isinstance(before, list | tuple):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before is after or before == after


def test_explain_leaves_no_trace() -> None:
    model = build("gpt2", dropout=0.2).eval()
    model.transformer.h[0].train()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    called: list[str] = []
    model.register_forward_pre_hook(lambda *_: called.append("hook"))
    inputs = {"input_ids": ids(VOCABULARY), "attention_mask": padded()}
    before = state_of(model)
    report = regate_fx.explain(model, **inputs)
    assert_same(before, state_of(model))
    assert report.gated == 2
    assert called == []
    assert not any(hasattr(value, "_dynamo_dynamic_indices") for value in inputs.values())


def test_explain_leaves_no_trace_where_the_model_has_to_run() -> None:
    model = Untidy().eval()
    LOG.clear()
    before = state_of(model)
    report = regate_fx.explain(model, input_ids=ids())
    after = state_of(model)
    assert report.gated == 2
    assert LOG
    assert all(LOG), "it must be seen as in training"
    # The buffer was written to, and has its value back.
    assert before.pop("versions") != after.pop("versions")
    assert_same(before, after)


def test_explain_takes_embeddings_and_positions() -> None:
    model = build("llama")
    embeddings = model.get_input_embeddings()(ids(VOCABULARY))
    positions = torch.arange(S).expand(B, S)
    report = regate_fx.explain(model, inputs_embeds=embeddings, position_ids=positions)
    assert [layer.kind for layer in report.layers] == ["varlen", "varlen"]
    assert embeddings.grad_fn is not None


def test_a_gated_model_can_be_explained() -> None:
    model = HandMade(Layer(Attention()))
    gated = gate(model)
    assert regate_fx.explain(gated, input_ids=ids()).gated == 1
    assert gated.report is None


def reasons(model: nn.Module, tokens: Tensor) -> list[str]:
    """What `explain` says of a model that cannot be gated; a gated call must refuse it for the same."""
    report = regate_fx.explain(model, input_ids=tokens)
    assert report.gated == 0
    assert all(layer.cost.saved == 0 for layer in report.layers)
    assert "Nothing in this model can be gated." in str(report)
    with pytest.raises(NotGateable) as refused:
        gate(model)(input_ids=tokens, labels=tokens, token_mask=mask(3, 3)[:, : tokens.shape[1]])
    assert set(report.refusals) <= set(refused.value.refusals)
    return [str(refusal) for refusal in report.refusals]


def test_a_state_space_model_is_refused_with_the_reason() -> None:
    config = MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=1, state_size=4)
    without, *operators = reasons(MambaForCausalLM(config), ids(length=4))
    assert "no attention over the decoder's positions" in without
    assert any("aten.conv1d" in reason and "modeling_mamba.py:" in reason for reason in operators)


def test_a_model_without_attention_is_refused_with_the_operators() -> None:
    model = HandMade(Layer(CausalConvolution()), Layer(CausalConvolution()))
    without, convolution = reasons(model, ids())
    assert "no attention over the decoder's positions" in without
    assert "aten.conv1d" in convolution
    assert "test_report.py:" in convolution


def test_a_loss_that_is_no_cross_entropy_makes_every_layer_dense() -> None:
    model = HandMade(
        Layer(Attention()), loss=lambda logits, labels: (logits.mean(-1) - labels).square().mean()
    )
    report = regate_fx.explain(model, input_ids=ids())
    assert [layer.kind for layer in report.layers] == ["dense"]
    [reason] = reasons(model, ids())
    assert "loss" in reason
