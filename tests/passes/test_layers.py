"""Layers are found by structure: the residual stream and the attention between its values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured import run_until
from small_decoder import Block, Decoder, Loss, batch, decoder
from torch import Tensor, nn

from regate_fx.passes.base import Refused, operator_name
from regate_fx.passes.layers import DecoderStack


def stack(model: nn.Module) -> DecoderStack:
    return run_until("find_layers", Loss(model), batch()).context.findings["layers"]


class PostNorm(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.attention_norm(x + self.attend(x, mask))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Parallel(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return x + self.attend(y, mask) + self.down(F.gelu(self.up(y)))


class TwoAttentions(Block):
    """Two attentions that read the same stream value."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        x = x + self.attend(y, mask) + self.attend(y * self.scale, mask)
        return x + self.down(F.gelu(self.up(self.attention_norm(x))))


class HandWritten(Block):
    """Softmax of scores, as a group of operators over pairs."""

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        S = x.shape[1]
        seen = torch.arange(S)[:, None] >= torch.arange(S)
        scores = self.q(x) @ self.k(x).mT
        weights = scores.masked_fill(~seen, torch.finfo(x.dtype).min).softmax(-1)
        return self.o(weights @ self.v(x))


class NormedStream(Block):
    """The residual is taken behind the norm, so that the norm's output is a stream value too."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.attention_norm(x)
        y = y + self.attend(y, mask)
        return y + self.down(F.gelu(self.up(self.norm(y))))


class Convolution(Block):
    """A layer without attention, that mixes neighbouring tokens."""

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weight = self.weight[:, None, :3]
        return F.conv1d(F.pad(x.mT, (2, 0)), weight, groups=x.shape[-1]).mT


BLOCKS: list[Callable[[], nn.Module]] = [Block, PostNorm, Parallel, TwoAttentions, HandWritten]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_layers_are_counted_and_end_where_the_next_begins(block: Callable[[], nn.Module], depth: int) -> None:
    found = stack(Decoder([block() for _ in range(depth)]))

    assert len(found.layers) == depth
    assert [layer.index for layer in found.layers] == list(range(depth))
    attentions = 2 if block is TwoAttentions else 1
    assert [len(layer.attentions) for layer in found.layers] == [attentions] * depth
    assert [layer.attentions[0].kernel for layer in found.layers] == [block is not HandWritten] * depth
    for before, after in zip(found.layers, found.layers[1:], strict=False):
        assert before.end is after.start
    written = "aten.layer_norm" if block is PostNorm else "aten.add"
    assert found.layers[0].start is not None
    assert operator_name(found.layers[0].start) == "aten.add"  # embeddings and positions
    assert all(layer.end is not None and operator_name(layer.end) == written for layer in found.layers)


def test_layers_that_mix_otherwise_stand_between_those_with_attention() -> None:
    kinds = [Convolution, Block, Convolution, Convolution, Block, Convolution]
    found = stack(Decoder([kind() for kind in kinds]))
    assert [len(layer.attentions) for layer in found.layers] == [int(kind is Block) for kind in kinds]
    for before, after in zip(found.layers, found.layers[1:], strict=False):
        assert before.end is after.start
    assert operator_name(found.layers[0].anchor) == "aten.pad"
    (after,) = found.layers[-1].end.users  # type: ignore[union-attr]
    assert operator_name(after) == "aten.layer_norm"


def test_a_layer_begins_where_its_module_does() -> None:
    found = stack(Decoder([NormedStream(), NormedStream()]))
    assert [operator_name(layer.start) for layer in found.layers] == ["aten.add", "aten.add"]  # type: ignore[arg-type]
    assert found.layers[0].end is found.layers[1].start


def test_what_mixes_beside_an_attention_is_part_of_its_layer() -> None:
    found = stack(decoder(lambda block, x, mask: block.scale * x.cumsum(1)))
    assert [len(layer.attentions) for layer in found.layers] == [1, 1]


def test_the_last_layer_ends_before_the_final_norm() -> None:
    for depth in (1, 3):
        found = stack(decoder(layers=depth))
        end = found.last_stream
        assert end is not None
        (after,) = end.users
        assert operator_name(after) == "aten.layer_norm"
        assert found.segment[end] == depth - 1
        assert found.segment[after] == depth


def test_what_lies_before_between_and_after_is_told_apart() -> None:
    found = stack(decoder(layers=2))
    segments = {operator_name(node): found.segment[node] for node in found.content}
    assert segments["aten.embedding"] == -1
    assert segments["aten.cross_entropy_loss"] == 2
    attentions = [layer.anchor for layer in found.layers]
    assert [found.segment[node] for node in attentions] == [0, 1]


def test_masks_and_positions_are_no_content() -> None:
    run = run_until("find_layers", Loss(decoder()), batch(padded=True))
    found: DecoderStack = run.context.findings["layers"]
    names = {operator_name(node) for node in found.content}
    assert "aten.arange" not in names
    assert "aten.scaled_dot_product_attention" in names


def test_a_model_without_layer_modules_is_understood_by_its_additions() -> None:
    """No list of layers, no numbered module: only the arithmetic says where the one layer ends."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = decoder(layers=1)
            self.block = self.inner.layers[0]
            self.inner.layers = nn.ModuleList()

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.block(self.inner.embedding(input_ids))
            return self.inner.loss(self.inner.head(self.inner.final_norm(x)), labels)

    found: DecoderStack = run_until("find_layers", Flat(), batch()).context.findings["layers"]
    (layer,) = found.layers
    assert layer.end is not None
    (after,) = layer.end.users
    assert operator_name(after) == "aten.layer_norm"


def test_a_graph_without_attention_is_refused_by_name() -> None:
    class NoAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(23, 8)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return self.embedding(input_ids).sum() + labels.sum()

    with pytest.raises(Refused, match="no attention") as caught:
        run_until("find_layers", NoAttention(), batch())
    assert caught.value.code == "no-attention"
