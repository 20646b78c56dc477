"""Encoder-decoders: the decoder's self-attention is gated, what it reads of the encoder is left alone.

Shapes: B samples, T positions of the encoder, S of the decoder, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import regate_fx

V = 61
NO_LABEL = -100


def bart(implementation: str) -> nn.Module:
    config = BartConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        dropout=0.0, attn_implementation=implementation,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def t5(implementation: str) -> nn.Module:
    config = T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, attn_implementation=implementation,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


MODELS = [(bart, "sdpa", "varlen"), (bart, "eager", "varlen"), (t5, "eager", "compact")]


@dataclass(frozen=True)
class Pair:
    """A batch for both stacks; token_mask bool [B, S]."""

    inputs: dict[str, Tensor]
    labels: Tensor
    token_mask: Tensor

    @property
    def active(self) -> Tensor:
        return self.token_mask & self.inputs["decoder_attention_mask"].bool()


def pair(generator: torch.Generator, B: int, T: int, S: int) -> Pair:
    def ids(length: int) -> Tensor:
        return torch.randint(3, V, (B, length), generator=generator)

    def mask(length: int) -> Tensor:
        kept = torch.arange(length) < torch.randint(2, length + 1, (B, 1), generator=generator)
        kept[0] = True
        return kept.long()

    decoder_mask = mask(S)
    token_mask = torch.rand(B, S, generator=generator) < 0.6
    token_mask[0, :2] = True
    inputs = {
        "input_ids": ids(T), "attention_mask": mask(T), "decoder_input_ids": ids(S),
        "decoder_attention_mask": decoder_mask,
    }  # fmt: skip
    return Pair(inputs, ids(S).masked_fill(decoder_mask == 0, NO_LABEL), token_mask)


def oracle(model: nn.Module, batch: Pair) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, losses by label and gradients of the untouched model in which no query sees an elided key."""
    model.zero_grad(set_to_none=True)
    labels = batch.labels.masked_fill(~batch.active, NO_LABEL)
    logits = model(**batch.inputs | {"decoder_attention_mask": batch.active.long()}).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none")
    loss = losses.sum() / (labels != NO_LABEL).sum()
    loss.backward()
    return loss.detach(), losses.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("build", "implementation", "kind"), MODELS)
def test_a_gated_step_is_that_of_the_active_positions(
    build, implementation: str, kind: str, generator: torch.Generator
) -> None:
    model = build(implementation).double()
    gated = regate_fx.compile(model, backend="eager")
    # As long as each other first: the encoder's positions must not be taken for the decoder's.
    for B, T, S in ((3, 8, 8), (2, 11, 7), (3, 5, 9)):
        batch = pair(generator, B, T, S)
        gated.zero_grad(set_to_none=True)
        out = gated(**batch.inputs, labels=batch.labels, token_mask=batch.token_mask)
        out.loss.backward()
        found = gradients(model)
        loss, losses, wanted = oracle(model, batch)
        torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(out.token_loss.double(), losses, rtol=1e-5, atol=1e-6)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
    report = gated.report
    assert {layer.kind for layer in report.layers} == {kind}
    assert len(report.layers) == 2
    assert report.traces == 1


def test_what_the_decoder_skips_changes_nothing(generator: torch.Generator) -> None:
    model = bart("sdpa")
    gated = regate_fx.compile(model, backend="eager", validate=False)
    batch = pair(generator, 3, 6, 9)
    ids = batch.inputs["decoder_input_ids"]
    changed = batch.inputs | {"decoder_input_ids": torch.where(batch.active, ids, (ids + 5) % V)}
    first, second = (
        gated(**inputs, labels=batch.labels, token_mask=batch.token_mask)
        for inputs in (batch.inputs, changed)
    )
    assert torch.equal(first.token_loss, second.token_loss)
    everything = torch.ones_like(batch.token_mask)
    whole = gated(**batch.inputs, labels=batch.labels, token_mask=everything)
    assert not torch.allclose(whole.loss, first.loss)


def test_what_the_encoder_reads_is_read_whole(generator: torch.Generator) -> None:
    model = bart("sdpa")
    gated = regate_fx.compile(model, backend="eager", validate=False)
    batch = pair(generator, 2, 7, 7)
    everything = dict(batch.inputs, attention_mask=torch.ones(2, 7, dtype=torch.long))
    first = gated(**everything, labels=batch.labels, token_mask=batch.token_mask)
    for position in range(7):
        ids = everything["input_ids"].clone()
        ids[:, position] = (ids[:, position] + 1) % V
        changed = gated(**everything | {"input_ids": ids}, labels=batch.labels, token_mask=batch.token_mask)
        assert not torch.equal(first.loss, changed.loss), position
