"""Decide for every node whether it is computed at all positions, on active rows, or in the compact layout."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from regate_fx.ops.attention_kernels import Preferred, supported
from regate_fx.passes.axes import Axes
from regate_fx.passes.base import PassContext, PassResult, Refused, fake, is_tensors, operator_name
from regate_fx.passes.gradients import learned_nodes
from regate_fx.passes.hidden_keys import HiddenKeys, hidden_keys
from regate_fx.passes.layers import Attention, DecoderStack, Layer, numbered_modules
from regate_fx.passes.layouts import Layout
from regate_fx.passes.mask_forms import Form
from regate_fx.passes.masks import MaskProof
from regate_fx.passes.pair_groups import why_no_attention
from regate_fx.passes.residual import adds_up
from regate_fx.passes.rewrite_attention import autocast_dtype
from regate_fx.passes.rules import Kind, Operands
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.token_content import TokenContent, token_content
from regate_fx.passes.token_sums import TokenSums, find_token_sums, refuse_sums_over_all
from regate_fx.passes.written_attention import OwnOperators, WrittenAttention, written_attention


@dataclass
class Placement:
    """The layout of each node that is not dense, and where packed states are scattered back.

    `scatter_base[x]`: x is packed and also needed at every position; elided ones show that dense stream value.
    `no_kernel[x]`: why the attention that starts with x is compact, and the operator that makes it so. `written[x]`:
    the attention written by hand that x is an operator of, to become a single one. prefer: what attention operators
    are to be computed by.
    """

    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    scatter_base: dict[fx.Node, fx.Node] = field(default_factory=dict)
    no_kernel: dict[fx.Node, tuple[str, fx.Node]] = field(default_factory=dict)
    written: dict[fx.Node, WrittenAttention] = field(default_factory=dict)
    prefer: Preferred = "auto"

    def layout(self, node: fx.Node) -> Layout:
        return self.layouts.get(node, Layout.DENSE)


@dataclass(frozen=True)
class Place:
    """Choose layouts; puts a `Placement` into the findings. Layers that cannot be gated stay dense and are named.

    Beside it, as `token_sums`, the `TokenSums` it was made with.
    Refuses a graph in which packed values would be needed densely where no residual stream value can be scattered, and
    one whose device knows nothing of the kernel that is preferred.
    """

    prefer: Preferred = "auto"
    name: str = "place"
    after: tuple[str, ...] = ("find_layers", "prove_masks")

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        analysis: TokenAxes = ctx.findings["token_axes"]
        stack: DecoderStack = ctx.findings["layers"]
        sums = find_token_sums(gm.graph.nodes, stack, analysis, ctx.findings["plan"])
        ctx.findings["token_sums"] = sums
        content = token_content(gm.graph.nodes, stack, analysis)
        hidden = hidden_keys(gm.graph.nodes, stack, analysis, ctx.findings["padding"])
        for layer in stack.layers:
            layer.refused = _why_not(layer, stack, analysis, content, hidden)
        masks, forms = ctx.findings["masks"], ctx.findings["forms"]
        placement = _Placer(gm, stack, analysis, masks, forms, sums, self.prefer).place()
        ctx.findings["placement"] = placement
        if any(layer.refused is None for layer in stack.layers):
            refuse_sums_over_all(list(gm.graph.nodes), placement.layouts, stack, analysis)
        refusals = tuple(
            layer.refused.refusal(layer.index) for layer in stack.layers if layer.refused is not None
        )
        return PassResult(gm, len(placement.layouts), refusals)


def _why_not(
    layer: Layer, stack: DecoderStack, analysis: TokenAxes, content: TokenContent, hidden: HiddenKeys
) -> Refused | None:
    """The first reason, in graph order, why a layer cannot be gated."""
    for node, refused in analysis.unproven.items():
        if stack.segment.get(node) == layer.index:
            return refused
    for attention in layer.attentions:
        if (reason := why_no_attention(attention.nodes, analysis, content, hidden)) is not None:
            return reason
    return None


def _of_losses(nodes: list[fx.Node], stack: DecoderStack, analysis: TokenAxes) -> set[fx.Node]:
    """Losses, and what is computed from them alone: active rows are all they need, whatever their logits are for."""
    found: set[fx.Node] = set()
    for node in nodes:
        content = [source for source in node.all_input_nodes if source in stack.content]
        from_losses = bool(content) and all(source in found for source in content)
        if from_losses or analysis.kinds.get(node) is Kind.LOSS:
            found.add(node)
    return found


class _Placer:
    def __init__(
        self,
        gm: fx.GraphModule,
        stack: DecoderStack,
        analysis: TokenAxes,
        masks: dict[fx.Node, MaskProof],
        forms: dict[fx.Node, Form],
        sums: TokenSums,
        prefer: Preferred,
    ) -> None:
        self.nodes = [node for node in gm.graph.nodes if node.op != "output"]
        self.output: fx.Node = gm.graph.output_node()
        self.stack = stack
        self.analysis = analysis
        self.masks = masks
        self.forms = forms
        self.sums = sums
        self.batch_is_one = analysis.symbols.batch == 1
        self.learned = learned_nodes(self.nodes)
        self.of_losses = _of_losses(self.nodes, stack, analysis)
        self.dense: set[int] = {layer.index for layer in stack.layers if layer.refused is not None}
        self.placement = Placement(prefer=prefer)

    def place(self) -> Placement:
        if self._tail_is_dense():
            self.dense.add(len(self.stack.layers))
        self._find_scatter_points()
        needed_dense = self._needed_dense()
        while self._refuse_escapes(needed_dense):
            self.placement.scatter_base.clear()
            self._find_scatter_points()
            needed_dense = self._needed_dense()
        for node in self.nodes:
            is_of_rows = node in self.stack.content or node in self.sums.beside
            if is_of_rows and node not in needed_dense and self._is_packable(node):
                self.placement.layouts[node] = self._layout(node)
        self._find_written()
        return self.placement

    def _find_written(self) -> None:
        varying = self.stack.content | self.learned
        for layer in self.stack.layers:
            for attention in layer.attentions if layer.index not in self.dense else ():
                if not attention.kernel:
                    self._read_written(attention, varying)

    def _read_written(self, attention: Attention, varying: set[fx.Node]) -> None:
        """Attention that one operator is to compute has packed rows in the end, and nothing before."""
        found = written_attention(attention, self.analysis, self.forms, varying)
        if isinstance(found, OwnOperators):
            strange = f"one operator cannot do what {operator_name(found.node)} does here"
            self.placement.no_kernel[attention.nodes[0]] = strange, found.node
            return
        mask = True if found.proof.explicit else None
        reason = self._why_not_one_operator(
            found.result, found.query, found.value, found.proof, mask, 0.0, found.softcap
        )
        if reason is not None:
            self.placement.no_kernel[attention.nodes[0]] = reason, found.result
            return
        for node in (*found.inside, found.result):
            self.placement.written[node] = found
            del self.placement.layouts[node]
        self.placement.layouts[found.result] = Layout.PACKED

    def _layout(self, node: fx.Node) -> Layout:
        if operator_name(node) == "getitem":
            return self.placement.layout(node.args[0])  # several values are moved one by one
        kind = self.analysis.kinds.get(node)
        if kind is Kind.ATTENTION and (reason := self._why_no_kernel(node)) is not None:
            self.placement.no_kernel[node] = reason, node
            return Layout.COMPACT
        return Layout.COMPACT if kind in (Kind.PAIRS, Kind.SAMPLES) else Layout.PACKED

    def _why_no_kernel(self, node: fx.Node) -> str | None:
        """Why an attention operator cannot become the variable-length one, if it cannot."""
        op = Operands(node, self.analysis.axes, self.analysis.symbols)
        proof = self.masks[node]
        mask = op["attn_mask"] if proof.explicit else None
        if mask is not None and (mask in self.stack.content or mask in self.learned):
            return "its mask is learned"
        return self._why_not_one_operator(node, op["query"], op["value"], proof, mask, op["dropout_p"])

    def _why_not_one_operator(
        self,
        node: fx.Node,
        query: fx.Node,
        value: fx.Node,
        proof: MaskProof,
        mask: object,
        dropout: float,
        softcap: float = 0.0,
    ) -> str | None:
        queries, values = fake(query), fake(value)
        if self.placement.prefer == "model":
            return "the model's own operators are preferred"
        if self.placement.prefer != "auto" and queries.device.type == "cpu":
            reason = (
                f"attention={self.placement.prefer!r} names a CUDA kernel, and this attention is on the CPU"
            )
            raise Refused("kernel", reason, node)
        dtype = autocast_dtype(node, queries.device.type) or queries.dtype
        return supported(
            queries.device.type, dtype, proof.causal, proof.window, mask, dropout, queries.shape[-1],
            values.shape[-1], softcap,
        )  # fmt: skip

    def _is_packable(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node in self.analysis.unproven or fake(node) is None:
            return False
        if node in self.sums.all:
            return True
        if self.stack.segment[node] in self.dense:
            return node in self.of_losses
        kind = self.analysis.kinds.get(node)
        axes = self.analysis.axes.get(node)
        if kind is None:
            return False
        if isinstance(axes, Axes) and axes.has_tokens and kind is Kind.ROWS:
            return axes.sequences == 1 and (axes.has_batch or self.batch_is_one)
        return True

    def _tail_is_dense(self) -> bool:
        """After the last layer: an output over all positions, or an operator that is not proven."""
        outputs = [node for node in self.output.all_input_nodes if node in self.stack.content]
        for node in outputs:
            axes = self.analysis.axes.get(node)
            if isinstance(axes, Axes) and axes.has_tokens:
                return True
        return self._mixing_tail() is not None

    def _mixing_tail(self) -> fx.Node | None:
        """An operator behind the last layer that is not proven to treat every token by itself."""
        tail = len(self.stack.layers)
        return next((node for node in self.analysis.unproven if self.stack.segment.get(node) == tail), None)

    def _find_scatter_points(self) -> None:
        """Where a dense layer follows a gated one, its input is scattered onto the last dense stream value."""
        base: fx.Node | None = None
        for layer in self.stack.layers:
            if layer.index in self.dense:
                if base is not None and layer.start is not None:
                    self.placement.scatter_base[layer.start] = base
                base = None
            elif base is None:
                base = layer.start
        last = self.stack.last_stream
        if len(self.stack.layers) in self.dense and base is not None and last is not None:
            self._check_tail(base, last)
            self.placement.scatter_base[last] = base

    def _check_tail(self, base: fx.Node, last: fx.Node) -> None:
        """What mixes tokens behind the layers reads those that they skip: as they came, where layers only add to it."""
        mixes = self._mixing_tail()
        if mixes is None:
            return
        (first,) = (layer for layer in self.stack.layers if layer.start is base)
        is_inside = not set(numbered_modules(base)).isdisjoint(numbered_modules(first.anchor))
        if is_inside or not adds_up(base, last):
            reason = (
                f"{operator_name(mixes)} mixes tokens behind layers that do not only add to what they are given: what "
                "it is to read of a token that they skip is not known"
            )
            raise Refused("mixes-tokens", reason, mixes)

    def _refuse_escapes(self, needed_dense: set[fx.Node]) -> bool:
        """A gated layer must not be read at every position behind the residual stream's back."""
        first: dict[int, fx.Node] = {}
        for node in self.nodes:
            if node in needed_dense and node in self.stack.segment:
                first.setdefault(self.stack.segment[node], node)
        escaped = [layer for layer in self.stack.layers if layer.index in first.keys() - self.dense]
        for layer in escaped:
            node = first[layer.index]
            layer.refused = Refused(
                "escapes", f"{operator_name(node)} inside the layer is read at every position outside", node
            )
            self.dense.add(layer.index)
        return bool(escaped)

    def _needed_dense(self) -> set[fx.Node]:
        """Nodes that a dense node or an output reads at every position (a scatter point is not followed)."""
        needed: set[fx.Node] = set(self.placement.scatter_base.values())
        for node in reversed(self.nodes):
            if node in self.placement.scatter_base:
                continue
            for user in node.users:
                if self._reads_densely(user, node, needed):
                    needed.add(node)
                    break
        return needed

    def _reads_densely(self, user: fx.Node, node: fx.Node, needed: set[fx.Node]) -> bool:
        if node not in self.stack.content or (user.op != "output" and not is_tensors(fake(user))):
            return False
        axes = self.analysis.axes.get(node)
        if isinstance(axes, Axes) and not axes.has_tokens and not axes.aggregate and not axes.meaning:
            return False
        if user.op == "output":
            return isinstance(axes, Axes) and axes.has_tokens
        return user in needed or not self._is_packable(user)
