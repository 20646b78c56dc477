"""A break in the capture before or behind the decoder, and DDP's buckets, leave the gated step as it was."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from key_masked_engine import batch, gradients
from small_models import build
from tiers import tiers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import regate_fx
from regate_fx.errors import NotGateable


def broken(place: str) -> nn.Module:
    """A Llama whose capture breaks when it enters one of its modules."""
    model = build("llama")
    model.get_submodule(place).register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    return model


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    gated = regate_fx.compile(model, backend="eager")
    output = gated(**inputs)
    output.loss.backward()
    return output, gradients(model), gated.report


@pytest.mark.parametrize("place", tiers(["model.embed_tokens", "model.norm"], "model.embed_tokens"))
def test_a_break_around_the_decoder_does_no_harm(place: str) -> None:
    output, found, report = step(broken(place), batch())
    expected, wanted, _ = step(build("llama"), batch())
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.token_loss, expected.token_loss)
    assert torch.equal(output.counted, expected.counted)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert report.gated == 2


def test_a_break_among_the_layers_is_refused() -> None:
    gated = regate_fx.compile(broken("model.layers.1"), backend="eager")
    for _ in range(2):
        with pytest.raises(NotGateable):
            gated(**batch())


class Penalised(LlamaForCausalLM):
    """Adds to its loss a mean over all positions, which it computes in another graph than the loss."""

    first = by_sample = False

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        states = self.model(input_ids, **kwargs).last_hidden_state
        penalty = None
        if self.first:
            penalty = states.pow(2).mean((1, 2)) if self.by_sample else states.pow(2).mean()
        torch._dynamo.graph_break()
        logits = self.lm_head(states)
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        if penalty is None:
            torch._dynamo.graph_break()
            penalty = logits.logsumexp(-1).pow(2).mean()
        return CausalLMOutputWithPast(loss=loss + penalty.sum(), logits=logits)


@pytest.mark.parametrize(
    ("first", "by_sample", "reason"),
    [
        (True, False, "another graph computed, of tokens not known, is added to the loss"),
        (True, True, "another graph computed, of tokens not known, is added to the loss"),
        (False, False, "another graph computes with the loss"),
    ],
)
def test_a_loss_of_two_graphs_is_refused(first: bool, by_sample: bool, reason: str) -> None:
    model = build("llama")
    model.__class__ = Penalised
    model.first, model.by_sample = first, by_sample
    with pytest.raises(NotGateable, match=reason):
        regate_fx.compile(model, backend="eager", validate=False)(**batch())


def test_layers_that_decide_by_numbers_from_tensors_say_so() -> None:
    """Every layer is cut in two; that nothing was found in the pieces is not the reason."""
    model = build("llama")

    def repeat(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        for _ in range(int((output > 0).any())):
            output = output * 1.0
        return output

    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(repeat)
    with pytest.raises(NotGateable, match="decides by a number that it reads from a tensor") as caught:
        regate_fx.compile(model, backend="eager")(**batch())
    assert [refusal.code for refusal in caught.value.refusals] == ["number"]


@torch.library.custom_op("regate_fx_tests::unbound", mutates_args=())
def unbound(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@unbound.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    torch.library.get_ctx().new_dynamic_size()  # a size that no output has: Dynamo gives up
    return torch.empty_like(x)


def test_an_error_inside_dynamo_is_a_refusal() -> None:
    model = build("llama")
    model.model.norm.register_forward_pre_hook(lambda module, args: (unbound(*args),))
    with pytest.raises(NotGateable, match=r"cannot be captured whole \(PendingUnbackedSymbolNotFound"):
        regate_fx.compile(model, backend="eager")(**batch())


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gated = regate_fx.compile(build("llama"), backend="aot_eager", validate=False)
    # Buckets far smaller than the model: Dynamo's own DDP optimizer would cut the graph at each.
    parallel = DistributedDataParallel(gated, bucket_cap_mb=0.01)
    parallel(**batch(seed=rank)).loss.backward()
    assert gated.report.gated == 2
    assert gated.report.traces == 1
    torch.save(gradients(gated), f"{folder}/{rank}.pt")
    del parallel  # DDP may hang where its process group is gone before it
    gc.collect()
    dist.destroy_process_group()


def test_the_decoder_arrives_whole_inside_ddp(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = [step(build("llama"), batch(seed=rank))[1] for rank in range(2)]
    assert ranks[0].keys() == alone[0].keys()
    for name, gradient in ranks[0].items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, msg=name)
        assert torch.equal(gradient, ranks[1][name])
