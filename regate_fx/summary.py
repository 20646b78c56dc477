"""From what the passes found to a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, fx

from regate_fx.backend import Captures
from regate_fx.errors import LayerRefusal
from regate_fx.flops import BEFORE, BatchCosts, GraphCosts, graph_costs
from regate_fx.ops.attention_kernels import kernel_name
from regate_fx.passes.base import fake, source_line
from regate_fx.passes.layers import Attention, DecoderStack, Layer
from regate_fx.passes.layouts import Layout
from regate_fx.passes.masks import MaskProof
from regate_fx.passes.pipeline import PipelineRun
from regate_fx.passes.rewrite_attention import autocast_dtype
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.plan import TokenPlan
from regate_fx.report import BatchTokens, Cost, LayerReport, Report


def batch_tokens(plan: TokenPlan, attention_mask: Tensor | None) -> BatchTokens:
    """The numbers of a call's tokens, read from its plan and padding mask [B, S]. Waits for the device."""
    batch, length = plan.row_of.shape
    real = [length] * batch if attention_mask is None else (attention_mask != 0).sum(1).tolist()
    return BatchTokens(length, tuple(real), tuple(plan.cu_seqlens.diff().tolist()))


def summarise(captures: Captures, runs: Sequence[PipelineRun], batch: BatchTokens | None = None) -> Report:
    """The report of a model that `runs`, one for each of its graphs in order, rewrote.

    captures: all of the model's captures so far, earlier traces of the same graphs included. Without `batch`
    the report has no costs.
    """
    report = Report(traces=len(captures.runs), batch=batch)
    report.cost_of = BatchCosts(runs).of if runs else None
    for run in captures.runs:
        for name, seconds in run.seconds.items():
            report.seconds[name] = report.seconds.get(name, 0.0) + seconds
    for run in runs:
        _add(report, run, graph_costs(run, batch) if batch is not None else GraphCosts())
    refused = [reason.refusal() for reason in captures.refusals if reason.code != "no-attention"]
    if not report.layers:
        refused.append(_NO_ATTENTION)
    unproven = [reason for run in runs for reason in _unproven(run)]
    # Where there are layers, each has its own reason; a loss that stays dense has none but this.
    refused += [reason for reason in unproven if not report.layers or reason.code == "loss"]
    report.refusals = list(dict.fromkeys(refused))
    return report


def all_dense(report: Report, refusals: Sequence[LayerRefusal]) -> Report:
    """The report of a model that cannot be gated: every layer dense, for its own reason or the model's."""
    whole = [refusal for refusal in refusals if refusal.layer is None]
    reason = whole[0] if whole else refusals[0]

    def dense(layer: LayerReport) -> LayerReport:
        if layer.kind == "dense":
            return layer
        cost = Cost(layer.cost.dense, layer.cost.dense)
        return replace(layer, kind="dense", reason=reason.reason, source=reason.source, cost=cost)

    head = Cost(report.head.dense, report.head.dense)
    return replace(report, layers=[dense(layer) for layer in report.layers], refusals=whole, head=head)


_NO_ATTENTION = LayerRefusal(None, "no-attention", "no attention over the decoder's positions was found")


def _unproven(run: PipelineRun) -> Iterator[LayerRefusal]:
    """What else stands in the way: operators on token content that are not known to keep tokens apart."""
    stack: DecoderStack = run.context.findings["layers"]
    analysis: TokenAxes = run.context.findings["token_axes"]
    for node, refused in analysis.unproven.items():
        # "axis": the axes of an operand are unknown, which its own refusal explains.
        if node in stack.content and refused.code != "axis":
            yield refused.refusal()


def fuller(new: Sequence[PipelineRun], old: Sequence[PipelineRun]) -> list[PipelineRun]:
    """Of two calls' captures the one of the whole model: a later call may retrace only a part of it."""
    return list(new if _depth(new) >= _depth(old) else old)


def _depth(runs: Sequence[PipelineRun]) -> int:
    return sum(len(run.context.findings["layers"].layers) for run in runs)


def _add(report: Report, run: PipelineRun, costs: GraphCosts) -> None:
    stack: DecoderStack = run.context.findings["layers"]
    outside = costs.of(BEFORE)
    if report.layers and not stack.layers:
        report.head += outside
    else:
        report.before += outside
        report.head += costs.of(len(stack.layers))
    report.uncounted += costs.uncounted
    report.fused_loss |= bool(run.rewrites.get("fuse_head_loss"))
    for layer in stack.layers:
        report.layers.append(_layer(layer, len(report.layers), run, costs))


def _layer(layer: Layer, index: int, run: PipelineRun, costs: GraphCosts) -> LayerReport:
    attention = "; ".join(dict.fromkeys(_sees(attention, run) for attention in layer.attentions))
    cost = costs.of(layer.index)
    if layer.refused is not None:
        refusal = layer.refused.refusal(index)
        return LayerReport(index, "dense", attention, refusal.reason, refusal.source, cost)
    for slow in layer.attentions:
        if (reason := _why_compact(slow, run)) is not None:
            return LayerReport(index, "compact", attention, *reason, cost)
    return LayerReport(index, "varlen", attention, cost=cost)


def _sees(attention: Attention, run: PipelineRun) -> str:
    """What the queries see, and how that is known."""
    node, placement = attention.nodes[0], run.context.findings["placement"]
    if (written := placement.written.get(node)) is not None:
        proof = written.proof
        origin = "" if proof in (MaskProof(), MaskProof(explicit=True)) else ", proven from its masks"
        by = _by(written.result, written.query, written.value, proof, run, written.softcap)
        return f"{proof}{origin}{by}"
    if not attention.kernel:
        return "as written"
    proof = run.context.findings["masks"][node]
    masked = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    origin = "" if proof.explicit else ", declared" if masked is None else ", proven from the mask"
    by = "" if _is_compact(attention, run) else _by(node, node.args[0], node.args[2], proof, run)
    return f"{proof}{origin}{by}"


def _by(
    node: fx.Node, query: fx.Node, value: fx.Node, proof: MaskProof, run: PipelineRun, softcap: float = 0.0
) -> str:
    """Which of several kernels computes it; there is one on the CPU, and none where nothing is computed."""
    queries, widths = fake(query), (fake(query).shape[-1], fake(value).shape[-1])
    if queries.device.type in ("cpu", "meta"):
        return ""
    dtype = autocast_dtype(node, queries.device.type) or queries.dtype
    prefer = run.context.findings["placement"].prefer
    return f"; {kernel_name(prefer, dtype, proof.window, proof.explicit, *widths, softcap)}"


def _is_compact(attention: Attention, run: PipelineRun) -> bool:
    return any(run.context.findings["placement"].layout(node) is Layout.COMPACT for node in attention.nodes)


def _why_compact(attention: Attention, run: PipelineRun) -> tuple[str, str] | None:
    """Reason and source line, if an attention is not one variable-length operator."""
    if not _is_compact(attention, run):
        return None
    reason, node = run.context.findings["placement"].no_kernel[attention.nodes[0]]
    return reason if attention.kernel else f"its attention is written by hand: {reason}", source_line(node)
