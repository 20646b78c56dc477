"""Figures of the digits example: what the runs reached at which cost, and what the teacher expects word by word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from digits_scenes import NO_LABEL
from matplotlib import pyplot as plt
from matplotlib.colors import Normalize
from transformers import PreTrainedTokenizerFast

from regate_fx.runtime import ReferenceLosses

COLORS = {"dense": "tab:gray", "ReGATE": "tab:red"}
SHOWN_ANSWERS = 3


def draw_curves(runs: Sequence[tuple[str, dict[str, list[float]]]], path: Path) -> None:
    """Held-out accuracy against decoder tokens computed and against seconds of training, a line for each run."""
    figure, (by_tokens, by_time) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for name, costs in runs:
        thousands = [tokens / 1000 for tokens in costs["tokens"]]
        for axis, cost in ((by_tokens, thousands), (by_time, costs["seconds"])):
            axis.plot(cost, costs["accuracy"], color=COLORS[name], marker=".", linewidth=1.2, label=name)
    by_tokens.set_xlabel("decoder tokens computed, thousands")
    by_time.set_xlabel("seconds of training, teacher pass included")
    by_tokens.set_ylabel("held-out digits right")
    handles = dict(zip(*reversed(by_tokens.get_legend_handles_labels()), strict=True))
    by_tokens.legend(handles.values(), handles.keys(), loc="lower right")
    for axis in (by_tokens, by_time):
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    figure.tight_layout()
    _save(figure, path)


def draw_words(
    examples: Sequence[dict[str, Any]],
    losses: ReferenceLosses,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
) -> None:
    """A few scenes, and their answers with each word on the colour of its reference loss (the paper's Figure 5).

    Words that tell a digit have a frame.
    """
    chosen = _one_of_each_instruction(examples)[:SHOWN_ANSWERS]
    norm, colors = Normalize(0, 3), plt.get_cmap("YlOrRd")
    figure, axes = plt.subplots(
        len(chosen), 2, figsize=(11, 1.5 * len(chosen)), width_ratios=[1, 7], layout="constrained"
    )
    rows = []
    for (picture, text), example in zip(axes, chosen, strict=True):
        picture.imshow(example["pixel_values"][0], cmap="gray")
        picture.axis("off")
        text.axis("off")
        row = int(losses.find(torch.tensor([example["sample_id"]])))
        own = losses.of_row(row).tolist()
        told = [
            (label, seen)
            for label, seen in zip(example["labels"], example["seen"], strict=True)
            if label != NO_LABEL
        ]
        words = tokenizer.convert_ids_to_tokens([label for label, _ in told])
        frames = ["black" if seen else "none" for _, seen in told]
        rows.append((text, words, [colors(norm(loss)) for loss in own], frames))
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, colors), ax=axes, shrink=0.8)
    bar.set_label("reference loss (nats)")
    figure.draw_without_rendering()  # words are set by their width in the final layout
    for row in rows:
        _write(*row)
    _save(figure, path)


def _one_of_each_instruction(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for example in examples:
        prompt = tuple(
            token
            for token, label in zip(example["input_ids"], example["labels"], strict=True)
            if label == NO_LABEL
        )
        found.setdefault(prompt, example)
    return list(found.values())


def _write(axis: Any, words: Sequence[str], colors: Sequence[Any], frames: Sequence[str]) -> None:
    """Words side by side on coloured ground, in lines of equal height."""
    renderer = axis.figure.canvas.get_renderer()
    width = axis.get_window_extent().width
    x, line = 0.0, 0
    for word, color, frame in zip(words, colors, frames, strict=True):
        ground = {"facecolor": color, "edgecolor": frame, "pad": 1.8}
        shown = axis.text(
            x, 0.9 - 0.24 * line, word, bbox=ground, fontsize=9, family="monospace", va="center"
        )
        extent = shown.get_window_extent(renderer).width / width + 0.014
        if x + extent > 1:
            x, line = 0.0, line + 1
            shown.set_position((x, 0.9 - 0.24 * line))
        x += extent


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
