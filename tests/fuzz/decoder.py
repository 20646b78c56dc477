"""The model of a program: embeddings, layers, head and loss.

Shapes: B samples, S positions, K positions of a memory, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from blocks import norm
from cross import Memory
from layers import Block
from mixing import LONGEST, Mix
from program import Program
from scores import seen_by_index
from told import Pair, Told, from_grid, phases, to_grid
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

VOCABULARY = 13
IGNORED = -100
OFFSET = 2


@dataclass(frozen=True)
class Elision:
    """What the oracle sets on a model. active: bool [B, S]. gated: which of the layers run, counted as they run."""

    active: Tensor
    gated: frozenset[int]


class Decoder(nn.Module):
    """A causal language model. `elision` is None but in the oracle's runs."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.elision: Elision | None = None
        D, count = program.width, len(program.layers)
        self.embed = nn.Embedding(VOCABULARY, D)
        self.learned = nn.Embedding(LONGEST + OFFSET, D)
        self.per_layer = nn.Embedding(VOCABULARY, count * D)
        self.embed_norm = norm("layer", D) if program.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(layer, program) for layer in program.layers)
        self.mix_before, self.mix_after = Mix(program.before, D), Mix(program.after, D)
        self.final_norm = norm("rms", D, program.float32) if program.final_norm else nn.Identity()
        self.head = nn.Linear(D, VOCABULARY, bias=not program.tied)
        self.memory = Memory(program.memory_by, VOCABULARY, D) if program.crosses else None
        self.second_head = nn.Linear(D, VOCABULARY)
        if program.tied:
            self.head.weight = self.embed.weight
        self.collects, self.join = nn.Parameter(torch.ones(8)), nn.Linear(2 * D, D)
        self.register_buffer("causal", torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        B, S = input_ids.shape
        padding = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self._embedded(input_ids, padding)
        keys = None if memory_mask is None else memory_mask.bool()
        if self.memory is not None:
            memory = self.memory(memory, keys)
        x, first = self._through_layers(from_grid(x, self.program.layout), input_ids, padding, memory, keys)
        routed = [to_grid(states, self.program.layout, B, S) for states in (first, x)]
        x = routed[1]
        if self.program.after != "none":
            x = self.mix_after(x, padding)
        x = self.final_norm(x)
        logits = self.head(x)
        if self.program.logit_cap:
            logits = torch.tanh(logits / 3) * 3
        if self.program.float32:
            logits = logits.to(torch.float32)
        loss = None if labels is None else self._loss(logits, labels, padding, x)
        if loss is not None and self.program.router_loss != "none":
            loss = loss + 0.1 * sum(self._router_loss(states, padding) for states in routed)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    # -- before the layers -------------------------------------------------------------------------------------

    def _embedded(self, ids: Tensor, padding: Tensor) -> Tensor:
        program = self.program
        x = self.embed(ids)
        if program.embed_scale:
            x = x * program.width**0.5
        positions = self._positions(padding)
        if program.positions in ("learned", "counted"):
            x = x + self.learned(positions)
        elif program.positions == "learned_expanded":
            x = x + self.learned(torch.arange(ids.shape[1]).repeat(ids.shape[0], 1))
        elif program.positions == "learned_offset":
            x = x + self.learned(positions + OFFSET)
        elif program.positions == "sinusoidal":
            cos, sin = phases("half", positions, program.width, x.dtype)
            x = x + (cos + sin)[:, 0]
        x = self.embed_norm(x)
        return self.mix_before(x, padding) if program.before != "none" else x

    def _positions(self, padding: Tensor) -> Tensor:
        """int64 [1 or B, S]."""
        if self.program.positions in ("counted", "rotary_counted", "alibi_counted"):
            return (padding.cumsum(1) - 1).masked_fill(padding == 0, 1)
        return torch.arange(padding.shape[1])[None]

    def _masks(self, index: int, padding: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """keys [B, 1, 1, S], causal [S, S], visible [B, 1, S, S] of the layer that runs as number `index`.

        The only place where it is known what the oracle hides.
        """
        choice = self.layers[index % len(self.layers)].choice
        keys = padding[:, None, None, :].bool()
        hides = self._hides(index)
        if hides:
            assert self.elision is not None
            keys = keys & self.elision.active[:, None, None, :]
        S = padding.shape[1]
        query, key = torch.arange(S)[:, None], torch.arange(S)[None, :]
        causal = seen_by_index(choice.span, query, key, self._causal_order(S))
        if choice.span == "document":
            document = (ids == 4).cumsum(1)
            keys = keys & (document[:, None, :, None] == document[:, None, None, :])
        if choice.attend == "sdpa_causal" and not hides:
            return keys, causal, None
        return keys, causal, causal & keys

    def _hides(self, index: int) -> bool:
        """Whether the oracle hides keys from the layer that runs as number `index`."""
        return self.elision is not None and index in self.elision.gated

    def _causal_order(self, S: int) -> Tensor:
        """bool [S, S]: key at or before query."""
        if self.program.mask_by == "buffer":
            return self.causal[:S, :S]
        if self.program.mask_by == "tril":
            return torch.ones(S, S, dtype=torch.bool).tril()
        if self.program.mask_by == "triu":
            return ~torch.ones(S, S, dtype=torch.bool).triu(1)
        return torch.arange(S)[None, :] <= torch.arange(S)[:, None]

    def _additive(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        if self.program.additive_by == "times":
            return (1.0 - visible.to(dtype)) * self.program.least
        zeros = torch.zeros(visible.shape, dtype=dtype)
        if self.program.additive_by == "masked_fill":
            return zeros.masked_fill(~visible, self.program.least)
        return torch.where(visible, zeros, torch.full((), self.program.least, dtype=dtype))

    def _bias(self, padding: Tensor, dtype: torch.dtype) -> Tensor | None:
        """ALiBi [1 or B, H, 1 or S, S]."""
        kind = self.program.positions
        if not kind.startswith("alibi"):
            return None
        slopes = 2.0 ** -torch.arange(1, self.program.heads + 1, dtype=dtype).view(1, -1, 1, 1)
        key = self._positions(padding)[:, None, None, :].to(dtype)
        return slopes * (key - key.mT) if kind == "alibi" else slopes * key

    # -- layers ------------------------------------------------------------------------------------------------

    def _through_layers(
        self, x: Tensor, ids: Tensor, padding: Tensor, memory: Tensor | None, memory_keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What comes out of the last layer, and of the first."""
        program, layout = self.program, self.program.layout
        positions, bias = self._positions(padding), self._bias(padding, x.dtype)
        rotary: Pair | None = None
        if program.positions.startswith("rotary") and program.rotary_made == "outside":
            rotary = phases(program.positions, positions, program.width // program.heads, x.dtype)
        extras: Tensor | None = None
        if program.per_layer != "none":
            extras = self.per_layer(ids).unflatten(-1, (len(self.layers), program.width))
        state: Any = x
        if program.streams == "stacked":
            state = torch.stack([x, x], -2)
        elif program.streams == "two":
            state = (x, x)
        outputs = [x]
        lent: Pair | None = None
        masks: dict[tuple[str, bool, bool], tuple[Tensor, Tensor, Tensor | None]] = {}
        for index in range(len(self.layers) * program.loops):
            number = index % len(self.layers)
            choice = self.layers[number].choice
            kind = choice.span, choice.attend == "sdpa_causal", self._hides(index)
            if kind not in masks:
                masks[kind] = self._masks(index, padding, ids)
            keys, causal, visible = masks[kind]
            additive = self._additive(visible, x.dtype) if visible is not None and choice.adds_mask else None
            extra = None if extras is None else from_grid(extras[:, :, number], layout)
            told = Told(
                padding, ids, positions, keys, causal, visible, additive, bias, rotary, extra,
                memory=memory, memory_keys=memory_keys,
            )  # fmt: skip
            layer = self.layers[number]
            before = state = self._skipped(index, state, outputs)
            if program.checkpoint:
                after, kept = checkpoint(layer, state, told, lent, use_reentrant=False)
            else:
                after, kept = layer(state, told, lent)
            lent = kept if lent is None else lent
            state = self._held(index, before, after)
            outputs.append(state)
        first = self._joined(outputs[1])
        if program.skips == "collected":
            return sum((w * y for w, y in zip(self.collects, outputs[1:], strict=False)), start=x), first
        return self._joined(state), first

    def _joined(self, state: Any) -> Tensor:
        """One tensor of all streams."""
        if self.program.streams == "stacked":
            return state.sum(-2)
        return state[0] + state[1] if self.program.streams == "two" else state

    def _skipped(self, index: int, state: Any, outputs: list[Tensor]) -> Any:
        """What a layer reads, with what came out of earlier ones. outputs: the embeddings, then of every layer."""
        kind, last = self.program.skips, len(self.layers) * self.program.loops - 1
        if kind == "first" and index:
            return self.collects[0] * state + self.collects[1] * outputs[0]
        if kind == "joined" and index:
            return self.join(torch.cat([state, outputs[0]], -1))
        if kind == "mirrored" and index > last - index:
            return state + self.collects[index] * outputs[last - index]
        return state

    def _held(self, index: int, before: Any, after: Any) -> Any:
        """In the oracle, behind a gated layer: what went in, as a constant, at elided positions."""
        if self.elision is None or not self._hides(index):
            return after
        if isinstance(after, tuple):
            return tuple(self._held(index, b, a) for b, a in zip(before, after, strict=True))
        active = from_grid(self.elision.active[..., None], self.program.layout)
        while active.dim() < after.dim():
            active = active[..., None]
        return torch.where(active, after, before.detach())

    # -- loss --------------------------------------------------------------------------------------------------

    def _loss(self, logits: Tensor, labels: Tensor, padding: Tensor, x: Tensor) -> Tensor:
        kind, V = self.program.loss, logits.shape[-1]
        if kind == "unshifted":
            return F.cross_entropy(logits.view(-1, V), labels.view(-1))
        if kind == "classes_second":
            return F.cross_entropy(logits.transpose(1, 2), labels)
        if kind == "cut_logits":
            rows, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
            return F.cross_entropy(rows.view(-1, V), targets.view(-1), ignore_index=IGNORED)
        rows, targets = logits.reshape(-1, V), self._moved(labels, padding).reshape(-1)
        if kind == "by_hand":
            real = (targets != IGNORED).to(rows.dtype)
            losses = F.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="none")
            return (losses * real).sum() / real.sum()
        if kind == "log_softmax":
            return F.nll_loss(rows.log_softmax(-1), targets, ignore_index=IGNORED)
        if kind == "masked_by_labels":
            targets = targets.masked_fill(targets == 7, IGNORED)
        if kind.startswith("sum_by"):
            total = F.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="sum")
            return total / (labels.shape[0] if kind == "sum_by_batch" else (targets != IGNORED).sum())
        if kind == "sum":
            return F.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="sum") / 7
        loss = F.cross_entropy(rows, targets, ignore_index=IGNORED)
        if kind == "two_losses":
            second = self.second_head(x).reshape(-1, V)
            return loss + 0.1 * F.cross_entropy(second, targets, ignore_index=IGNORED)
        if kind == "with_penalty":
            return loss + 0.01 * self.embed.weight.square().sum()
        return 0.5 * loss if kind == "scaled" else loss

    def _router_loss(self, states: Tensor, padding: Tensor) -> Tensor:
        """A loss over all tokens, whatever their labels. states: [B, S, D]."""
        kind = self.program.router_loss
        rows, weights = states.reshape(-1, states.shape[-1]), padding.reshape(-1).to(states.dtype)
        if self.elision is not None:
            active = self.elision.active.reshape(-1)
            rows, weights = rows[active], weights[active]
        sharp = rows.logsumexp(-1).square()
        if kind == "mean":
            return sharp.mean()
        if kind == "by_mask":
            return (sharp * weights).sum() / weights.sum()
        shares, chosen = rows[:, :4].softmax(-1), rows[:, :4].argmax(-1)
        if kind == "by_position":
            return (shares * F.one_hot(chosen, 4)).sum(0).square().sum() / rows.shape[0]
        counts = rows.new_zeros(4).scatter_add(0, chosen.repeat_interleave(2), weights.repeat_interleave(2))
        return (counts / weights.sum() * ((shares * weights[:, None]).sum(0) / weights.sum())).sum()

    def _moved(self, labels: Tensor, padding: Tensor) -> Tensor:
        """Labels [B, S] at the positions that predict them."""
        kind = self.program.loss
        if kind == "join_labels":
            return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        if kind == "roll_labels":
            rolled = labels.roll(-1, 1)
            rolled[:, -1] = IGNORED
            return rolled
        if kind == "padding_ignored":
            labels = labels.masked_fill(padding == 0, IGNORED)
        return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


def build(program: Program) -> Decoder:
    """The model in float64, in training mode, with weights from the program's seed, far enough from zero to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed)
        model = Decoder(program).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() < 2 or name.endswith("streams"):
                    parameter.add_(noise, alpha=0.2)
                else:
                    scale = (
                        1.0 if isinstance(_owner(model, name), nn.Embedding) else parameter.shape[-1] ** -0.5
                    )
                    parameter.copy_(noise * scale)
    return model.train()


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
