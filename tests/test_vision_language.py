"""Models that see images: a gated step on real pixels is what the untouched model computes with elided keys masked.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import check_no_bit_differs
from image_oracle import check_image_step
from oracles import observe
from small_models import FIRST_WORD
from small_vlms import IMAGE, VLMS, ImageBatch, build_vlm, image_batch
from tiers import tiers

import regate_fx


def image_batches(name: str, generator: torch.Generator) -> list[ImageBatch]:
    """Both sides, none to three images in a sample, image positions always active and partly elided."""
    return [
        image_batch(name, generator, (1, 2), padding="right"),
        image_batch(name, generator, (2, 0, 1), padding="left", share=0.3, seen=0.5),
        image_batch(name, generator, (3, 1), padding="right", share=0.8, seen=0.6, words=8),
    ]


BACKENDS = tiers(("eager", "aot_eager"), "eager")
# One graph, several of them, and positions in three dimensions; the zoo sees pictures of the others.
SOME_VLMS = tiers(VLMS, "llava", "smolvlm", "qwen2_vl")


@pytest.mark.parametrize("name", SOME_VLMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_step(name: str, backend: str, generator: torch.Generator) -> None:
    model = build_vlm(name)
    gated = regate_fx.compile(model, backend=backend)
    # Each number of images is another trace.
    for number, batch in enumerate(image_batches(name, generator)[: 1 if backend == "eager" else 3]):
        check_image_step(gated, model, VLMS[name], batch, f"{name}, batch {number}")
        check_the_decoder_alone_is_gated(gated)
    assert gated.report.validation == "validated against the untouched model and the dense reference"
    check_elided_words_change_no_bit(gated, batch, generator)


def check_the_decoder_alone_is_gated(gated: Any) -> None:
    layers = gated.report.layers
    assert [layer.index for layer in layers] == list(range(gated.config.get_text_config().num_hidden_layers))
    assert {layer.kind for layer in layers} <= {"varlen", "compact"}, [layer.reason for layer in layers]


def with_other_elided_words(batch: ImageBatch, generator: torch.Generator) -> ImageBatch:
    """Ids that say which positions are images stay as they are."""
    other = torch.randint(FIRST_WORD, IMAGE, batch.input_ids.shape, generator=generator)
    return replace(batch, input_ids=torch.where(batch.active | batch.visual, batch.input_ids, other))


def check_elided_words_change_no_bit(gated: Any, batch: ImageBatch, generator: torch.Generator) -> None:
    changed = with_other_elided_words(batch, generator)
    assert not torch.equal(changed.input_ids, batch.input_ids)
    check_no_bit_differs(observe(gated, batch), observe(gated, changed))


# One graph, several of them, and positions in three dimensions; the others are captured like one of these.
@pytest.mark.parametrize("name", tiers(["llava", "smolvlm", "qwen2_vl"], "llava", "qwen2_vl"))
def test_other_sizes_cost_no_trace(name: str, generator: torch.Generator) -> None:
    """Batch size, length and active positions may change; the number of images stays, it is the model's own.

    Counted are the graphs that hold the plan. Code of a vision tower that breaks the graph is traced as it would be
    without us, for each new grid of patches.
    """
    gated = regate_fx.compile(build_vlm(name), backend="eager", validate=False)
    shapes = [((2, 2), 5), ((1, 2, 1), 5), ((2, 1, 0, 1), 3), ((1, 2, 1), 7), ((2, 2), 7)]
    batches = [image_batch(name, generator, counts, words=words) for counts, words in shapes]
    for batch in batches[:2]:
        observe(gated, batch)
    settled = gated.report.traces
    sizes = set()
    for batch in batches[2:]:
        observe(gated, batch)
        sizes.add((*batch.input_ids.shape, int(batch.active.sum())))
    assert len(sizes) == 3
    assert gated.report.traces <= settled + 1


def test_inductor(generator: torch.Generator) -> None:
    model = build_vlm("llava")
    gated = regate_fx.compile(model, backend="inductor")
    for batch in image_batches("llava", generator)[:2]:
        check_image_step(gated, model, VLMS["llava"], batch, "inductor")
    check_the_decoder_alone_is_gated(gated)


def test_too_few_image_positions_are_an_error(generator: torch.Generator) -> None:
    """The model's own check of its inputs stays in the compiled graph."""
    gated = regate_fx.compile(build_vlm("llava"), backend="aot_eager")
    batch = image_batch("llava", generator, (2, 1))
    observe(gated, batch)
    ids = batch.input_ids.clone()
    ids[0, batch.visual[0].nonzero()[0]] = FIRST_WORD
    with pytest.raises(RuntimeError, match="assertion failed"):
        observe(gated, replace(batch, input_ids=ids))
