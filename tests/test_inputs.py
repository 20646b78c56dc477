"""What a gated call hands to its engine.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from key_masked_engine import B, KeyMaskedEngine, S, batch, gate
from small_models import VOCABULARY, build
from transformers import BartConfig, BartForConditionalGeneration

from regate_fx.errors import InvalidInput
from regate_fx.outputs import GatedOutput
from regate_fx.wrapper import wrap


def test_an_encoder_decoder_is_gated_on_its_decoder() -> None:
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    plans = []

    class Recording(KeyMaskedEngine):
        def __call__(self, plan: Any, inputs: dict[str, Any]) -> GatedOutput:
            plans.append(plan)
            return GatedOutput()

    model = BartForConditionalGeneration(config)
    gated = wrap(model, Recording(model))
    padding = torch.ones(B, S)
    padding[:, -2:] = 0
    gated(
        input_ids=torch.ones(B, 4, dtype=torch.long),
        attention_mask=torch.ones(B, 4),
        decoder_input_ids=batch()["input_ids"],
        decoder_attention_mask=padding,
        token_mask=torch.ones(B, S, dtype=torch.bool),
    )
    assert torch.equal(plans[0].row_of >= 0, padding.bool())


def test_neutral_values_ask_for_nothing() -> None:
    gated, engine = gate(build("llama"))
    neutral = {
        "past_key_values": None,
        "use_cache": False,
        "output_hidden_states": False,
        "output_attentions": None,
        "logits_to_keep": 0,
        "label_smoothing": 0.0,
        "cu_seq_lens_q": None,
        "attention_mask": None,
        "return_dict": True,
    }
    gated(**batch(), **neutral)
    assert len(engine.seen) == 1
    assert "past_key_values" not in engine.seen[0]
    assert "return_dict" not in engine.seen[0]


def test_a_mask_over_pairs_leaves_all_of_the_token_mask_active() -> None:
    plans = []

    class Recording(KeyMaskedEngine):
        def __call__(self, plan: Any, inputs: dict[str, Any]) -> Any:
            plans.append((plan, inputs))
            return super().__call__(plan, inputs)

    model = build("llama")
    gated = wrap(model, Recording(model))
    inputs = batch()
    pairs = torch.zeros(B, 1, S, S)
    gated(**inputs, attention_mask=pairs)
    plan, seen = plans[0]
    assert torch.equal(plan.row_of >= 0, inputs["token_mask"])
    assert seen["attention_mask"] is pairs
    padding = torch.ones(B, S)
    padding[0, :4] = 0
    gated(**inputs, attention_mask=padding)
    assert torch.equal(plans[1][0].row_of >= 0, inputs["token_mask"] & (padding != 0))


@pytest.mark.parametrize("kind", ["bool", "finite", "infinite", "by_type"])
def test_a_position_whose_keys_are_all_elided_is_refused(kind: str) -> None:
    model = build("llama")
    gated = wrap(model, KeyMaskedEngine(model))
    inputs = {**batch(), "token_mask": torch.ones(B, S, dtype=torch.bool)}
    visible = torch.ones(B, 1, S, S, dtype=torch.bool).tril()
    visible[1, 0, 5] = torch.arange(S) == 2
    visible[1, 0, 6] = False  # sees nothing anyway
    lowest = torch.finfo(torch.float32).min if kind == "finite" else -torch.inf
    mask: Any = visible if kind == "bool" else torch.zeros(B, 1, S, S).masked_fill(~visible, lowest)
    mask = {"full_attention": mask} if kind == "by_type" else mask
    gated(**inputs, attention_mask=mask)
    inputs["token_mask"][1, 2] = False
    message = (
        r"^attention_mask: all positions that position 5 of sample 1 sees are elided, it itself is not\. Keep"
    )
    with pytest.raises(InvalidInput, match=message):
        gated(**inputs, attention_mask=mask)


def test_embeddings_stand_in_for_ids() -> None:
    gated, engine = gate(build("llama"))
    inputs = batch()
    embeds = gated.get_input_embeddings()(inputs.pop("input_ids"))
    output = gated(**inputs, inputs_embeds=embeds)
    assert torch.equal(output.loss, gated(**batch()).loss)
    assert set(engine.seen[0]) == {"inputs_embeds", "labels"}
