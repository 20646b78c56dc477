"""From what the passes found to a report."""

from __future__ import annotations

from regate_fx.backend import Captures
from regate_fx.passes.layers import Layer
from regate_fx.passes.layouts import Layout
from regate_fx.passes.pipeline import PipelineRun
from regate_fx.report import LayerReport, Report


def summarise(captures: Captures) -> Report:
    """The report of a model from all graphs captured so far; the latest capture of each layer counts."""
    report = Report(traces=len(captures.runs))
    refusals = [refused.refusal() for refused in captures.refusals if refused.code != "no-attention"]
    latest: dict[int, LayerReport] = {}
    for run in captures.runs:
        for name, seconds in run.seconds.items():
            report.seconds[name] = report.seconds.get(name, 0.0) + seconds
        for layer in run.context.findings["layers"].layers:
            latest[layer.index] = _layer(layer, run)
    report.layers = [latest[index] for index in sorted(latest)]
    report.refusals = refusals
    return report


def _layer(layer: Layer, run: PipelineRun) -> LayerReport:
    findings = run.context.findings
    if layer.refused is not None:
        refusal = layer.refused.refusal(layer.index)
        return LayerReport(layer.index, "dense", "as captured", refusal.reason, refusal.source)
    layouts = {findings["placement"].layout(node) for attention in layer.attentions for node in attention.nodes}
    if Layout.COMPACT in layouts:
        return LayerReport(layer.index, "compact", "as captured, over active slots")
    proofs = {str(findings["masks"][attention.nodes[0]]) for attention in layer.attentions}
    return LayerReport(layer.index, "varlen", ", ".join(sorted(proofs)))
