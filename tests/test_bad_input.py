"""Bad and unsupported arguments of a gated call: named, with a remedy, before anything is computed.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from key_masked_engine import B, S, batch, gate, without_mask
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_models import build
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache
from transformers.modeling_outputs import CausalLMOutput

import regate_fx
from regate_fx.errors import InvalidInput, NotGateable, RegateError, Unsupported

MASK = torch.ones(B, S, dtype=torch.bool)
IDS = torch.ones(B, S, dtype=torch.long)
D = 32


@pytest.fixture(scope="module")
def gated() -> Any:
    return gate(build("llama"))[0]


def refusal(model: Any, **inputs: Any) -> RegateError:
    """The error of a call, which must come before any module inside the model and before the engine runs."""
    ran: list[str] = []
    handles = [m.register_forward_pre_hook(lambda *_: ran.append("ran")) for m in list(model.modules())[1:]]
    with pytest.raises(RegateError) as caught:
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert ran == []
    assert model.report is None
    return caught.value


INVALID = {
    "mask of another length": (
        {"token_mask": torch.ones(B, S + 1, dtype=torch.bool)},
        "token_mask: expected shape [2, 9] like the batch, got [2, 10]. "
        "Give one entry per position of the decoder's input.",
    ),
    "mask of one sample": (
        {"token_mask": MASK[0]},
        "token_mask: expected shape [2, 9] like the batch, got [9]. "
        "Give one entry per position of the decoder's input.",
    ),
    "integer mask": (
        {"token_mask": MASK.long()},
        "token_mask: expected dtype torch.bool, got torch.int64. Use mask.bool().",
    ),
    "list": (
        {"token_mask": MASK.tolist()},
        "token_mask: expected a bool tensor, got list. Pass a [B, S] tensor.",
    ),
    "mask elsewhere": (
        {"token_mask": MASK.to("meta")},
        "token_mask: is on meta, the batch on cpu. Move it with .to('cpu').",
    ),
    "nothing active": (
        {"token_mask": ~MASK},
        "token_mask: no position of the batch is active. "
        "Keep at least one position that attention_mask does not mark as padding.",
    ),
    "only padding active": (
        {"attention_mask": torch.zeros(B, S, dtype=torch.long)},
        "token_mask: no position of the batch is active. "
        "Keep at least one position that attention_mask does not mark as padding.",
    ),
    "empty batch": (
        {"input_ids": IDS[:0], "token_mask": MASK[:0], "labels": IDS[:0]},
        "token_mask: no position of the batch is active. "
        "Keep at least one position that attention_mask does not mark as padding.",
    ),
    "shifted labels": (
        {"labels": IDS[:, 1:]},
        "labels: expected shape [2, 9] like the decoder's input, got [2, 8]. "
        "Give one label per position, -100 where there is none.",
    ),
    "flat labels": (
        {"labels": IDS.flatten()},
        "labels: expected shape [2, 9] like the decoder's input, got [18]. "
        "Give one label per position, -100 where there is none.",
    ),
    "int32 labels": (
        {"labels": IDS.int()},
        "labels: expected dtype torch.int64, got torch.int32. Use labels.long().",
    ),
    "labels elsewhere": (
        {"labels": IDS.to("meta")},
        "labels: is on meta, the batch on cpu. Move it with .to('cpu').",
    ),
    "list of labels": (
        {"labels": IDS.tolist()},
        "labels: expected a tensor, got list. Pass int64 [B, S].",
    ),
    "no input": (
        {"input_ids": None},
        "input_ids: neither input_ids nor inputs_embeds was given. "
        "token_mask needs one of them for its shape.",
    ),
    "flat ids": (
        {"input_ids": IDS[0]},
        "input_ids: expected a tensor [B, S], got [9]. Give one row per sample.",
    ),
    "list of ids": (
        {"input_ids": IDS.tolist()},
        "input_ids: expected a tensor [B, S], got list. Give one row per sample.",
    ),
    "flat embeddings": (
        {"input_ids": None, "inputs_embeds": torch.ones(S, D)},
        "inputs_embeds: expected a tensor [B, S, D], got [9, 32]. Give one row per sample.",
    ),
    "longer attention mask": (
        {"attention_mask": torch.ones(B, S + 1)},
        "attention_mask: expected shape [2, 9] like the decoder's input, got [2, 10]. "
        "Give one entry per position, zero at padding.",
    ),
    "attention mask elsewhere": (
        {"attention_mask": torch.ones(B, S, device="meta")},
        "attention_mask: is on meta, the batch on cpu. Move it with .to('cpu').",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_named(gated: Any, case: str) -> None:
    changed, message = INVALID[case]
    error = refusal(gated, **{**batch(), "token_mask": MASK, **changed})
    assert isinstance(error, InvalidInput)
    assert str(error) == message
    assert message.startswith(error.argument)


UNSUPPORTED = {
    "past_key_values": (DynamicCache(), "keeps no cache", "or leave out token_mask"),
    "use_cache": (True, "keeps no cache", "Pass the whole sequence and use_cache=False"),
    "output_hidden_states": (True, "elided positions have no state", "Leave out token_mask"),
    "output_attentions": (True, "elided positions have no state", "Leave out token_mask"),
    "cu_seq_lens_q": (torch.tensor([0, S]), "cannot be composed with token_mask", "one document per row"),
    "cu_seq_lens_k": (torch.tensor([0, S]), "cannot be composed with token_mask", "one document per row"),
    "max_length_q": (S, "cannot be composed with token_mask", "one document per row"),
    "max_length_k": (S, "cannot be composed with token_mask", "one document per row"),
    "logits_to_keep": (1, "the active positions only", "Leave out token_mask"),
    "shift_labels": (IDS, "pairs labels and positions itself", "Pass unshifted labels"),
    "label_smoothing": (0.1, "changes the loss", "Train without label smoothing"),
    "label_smoothing_factor": (0.1, "changes the loss", "Train without label smoothing"),
    "sample_id": (torch.arange(B), "compiled without one", "Compile it with gate="),
}


@pytest.mark.parametrize("argument", UNSUPPORTED)
def test_unsupported_arguments_are_named(gated: Any, argument: str) -> None:
    value, why, remedy = UNSUPPORTED[argument]
    error = refusal(gated, **{**batch(), argument: value})
    assert isinstance(error, Unsupported)
    assert str(error).startswith(argument)
    assert why in str(error)
    assert remedy in str(error)


def test_the_untouched_model_takes_what_a_gated_call_refuses(gated: Any) -> None:
    output = gated(**without_mask(batch()), output_hidden_states=True, use_cache=True, logits_to_keep=0)
    assert len(output.hidden_states) == 3
    assert output.past_key_values is not None
    with pytest.raises(Unsupported, match="sample_id"):
        gated(**without_mask(batch()), sample_id=torch.arange(B))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_a_config_that_asks_for_states_is_refused_unless_the_call_does_not(name: str) -> None:
    model = build("llama", attn_implementation="eager")
    setattr(model.config, name, True)
    gated, engine = gate(model)
    error = refusal(gated, **batch())
    assert str(error).startswith(f"{name}=True with token_mask is not supported")
    gated(**batch(), **{name: False})
    assert len(engine.seen) == 1


def test_a_decoder_fed_from_labels_alone_is_refused() -> None:
    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    gated, _ = gate(BartForConditionalGeneration(config))
    error = refusal(gated, **batch())
    assert str(error) == (
        "decoder_input_ids: neither decoder_input_ids nor decoder_inputs_embeds was given. "
        "token_mask needs one of them for its shape."
    )


def test_arguments_without_a_name_are_refused() -> None:
    class Takes(nn.Module):
        def forward(self, *tokens: Any, **kwargs: Any) -> Any:
            return tokens

    gated, engine = gate(Takes())
    with pytest.raises(InvalidInput, match=r"tokens: .*by keyword"):
        gated(IDS, token_mask=MASK)
    assert engine.seen == []


@pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_that_add_positions_are_refused(adapter: Any) -> None:
    options = adapter(task_type="CAUSAL_LM", num_virtual_tokens=3)
    inside, _ = gate(get_peft_model(build("llama"), options))
    error = refusal(inside, **batch())
    assert "prompt-learning adapter" in str(error)
    assert "Use another kind of adapter" in str(error)
    gated, engine = gate(build("llama"))
    with pytest.raises(RegateError, match=r"token_mask: expected shape \[2, 12\]|past_key_values"):
        get_peft_model(gated, options)(**batch())
    assert engine.seen == []


RAN: list[torch.Size] = []


@torch.library.custom_op("regate_fx_tests::seen", mutates_args=())
def seen(states: torch.Tensor) -> torch.Tensor:
    """The states; notes that it was run, which no hook on a captured module can."""
    RAN.append(states.shape)
    return states.clone()


seen.register_fake(torch.empty_like)
seen.register_autograd(lambda ctx, grad: grad)


class WithoutAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, D), nn.Linear(D, 20)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        logits = self.head(seen(self.embedding(input_ids)))
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 20), labels[:, 1:].reshape(-1))
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("validate", [True, False])
def test_a_model_without_attention_is_refused_before_anything_of_it_runs(validate: bool) -> None:
    gated = regate_fx.compile(WithoutAttention(), backend="eager", validate=validate)
    RAN.clear()
    for _ in range(2):
        with pytest.raises(NotGateable, match="no attention"):
            gated(input_ids=IDS, labels=IDS, token_mask=MASK)
    assert not RAN
    gated(input_ids=IDS, labels=IDS)
    assert len(RAN) == 1
