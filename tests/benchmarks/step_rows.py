"""The ways to compute one training step that are timed side by side.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from clock import Row
from hand_packed import causal_only_model, pack, without_padding
from peft import LoraConfig, get_peft_model
from random_ltd import random_ltd_model
from step_models import Shape, keep, make_batch, make_model, with_same_weights
from torch import Tensor

import regate_fx
from regate_fx.runtime import DualCycle, ReGate, label_table

SHARES = (1.0, 0.75, 0.5, 0.25)
EAGER, DENSE, CAUSAL = "dense, eager", "dense, compiled", "dense, compiled, causal without a mask"
FLASH, MASKED, LTD = "dense, compiled, flash_attn", "dense-masked 0.5", "random-LTD 0.5, compiled"
ONE_ROW = "padding-free (one masked row), compiled"
WITH_GATE, WITH_COLLATION = "gated 0.5, with a gate", "gated 0.5, with a gate and its collation"
# The first of each pair must have the loss and the gradients of the second, where both are there.
EQUAL = (
    (DENSE, EAGER),
    (CAUSAL, DENSE),
    (FLASH, DENSE),
    (ONE_ROW, DENSE),
    ("gated 1.0", DENSE),
    ("gated 0.75", "hand-packed 0.75"),
    ("gated 0.5", "hand-packed 0.5"),
    ("gated 0.25", "hand-packed 0.25"),
    ("gated 0.5", MASKED),
)


@dataclass(frozen=True)
class Tuning:
    """What is trained, and whether activations are computed again in the backward."""

    lora: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        return ("LoRA" if self.lora else "full") + (", checkpointing" if self.checkpointing else "")

    def apply(self, model: Any) -> Any:
        if self.lora:
            model = get_peft_model(
                model, LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False
            )
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model


@dataclass
class Rows:
    """All rows of one shape and tuning, of the same weights. gated: one model for all shares, as a user has it."""

    shape: Shape
    tuning: Tuning
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.model = self.tuning.apply(make_model(self.shape, self.device, self.dtype))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # The step does all its work and leaves the weights as they are, for losses to stay comparable.
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
        self.batch = make_batch(self.shape, self.device, self.dtype)
        self.masks = {share: keep(self.batch, share) for share in SHARES}
        # No other row computes head and losses by chunks.
        self.gated = regate_fx.compile(self.model, fused_loss=False)
        self.rows: dict[str, Row] = {}
        self.positions: dict[str, int] = {}

    def add(self, name: str, positions: int, called: Any, arguments: dict[str, Any]) -> None:
        self.rows[name] = Row(lambda: called(**arguments), self.model, self.optimizer)
        self.positions[name] = positions

    def add_dense(self) -> None:
        everything = self.batch["input_ids"].numel()
        self.add(DENSE, everything, torch.compile(self.model, dynamic=False), self.batch)
        if not self.shape.padded:
            causal = torch.compile(causal_only_model(self.model), dynamic=False)
            arguments = {**self.batch, "attention_mask": torch.ones_like(self.batch["input_ids"])}
            self.add(CAUSAL, everything, causal, arguments)

    def add_eager(self) -> None:
        self.add(EAGER, self.batch["input_ids"].numel(), self.model, self.batch)

    def add_flash(self) -> None:
        """Where it is installed. Of a single sample, transformers decides by a tensor whether it is packed."""
        if self.device == "cuda" and _has_flash_attn() and self.shape.B > 1:
            flash = with_same_weights(self.model)
            flash.set_attn_implementation("flash_attention_2")
            self.add(FLASH, self.batch["input_ids"].numel(), torch.compile(flash, dynamic=False), self.batch)

    def add_masked(self) -> None:
        masked = regate_fx.compile(self.model, reference=True)
        everything = self.batch["input_ids"].numel()
        self.add(MASKED, everything, masked, {**self.batch, "token_mask": self.masks[0.5]})

    def add_one_row(self) -> None:
        arguments = without_padding(self.batch)
        compiled = torch.compile(self.model, dynamic=False)
        self.add(ONE_ROW, arguments["input_ids"].numel(), compiled, arguments)

    def add_random_ltd(self) -> None:
        S, depth = self.shape.S, self.shape.layers
        positions = self.shape.B * (2 * S + (depth - 2) * S // 2) // depth
        dropping = torch.compile(random_ltd_model(self.model, 0.5), dynamic=False)
        arguments = {**self.batch, "attention_mask": torch.ones_like(self.batch["input_ids"])}
        self.add(LTD, positions, dropping, arguments)

    def add_hand_packed(self, shares: Iterable[float]) -> None:
        packed_model = causal_only_model(self.model)
        for share in shares:
            arguments = pack(self.batch, self.masks[share])
            compiled = torch.compile(packed_model, dynamic=False)
            self.add(f"hand-packed {share}", arguments["input_ids"].numel(), compiled, arguments)

    def add_gated(self, shares: Iterable[float]) -> None:
        for share in shares:
            mask = self.masks[share]
            self.add(f"gated {share}", int(mask.sum()), self.gated, {**self.batch, "token_mask": mask})

    def add_with_gate(self) -> None:
        """The whole runtime on top, with a random half of the labels. Calls that bring a mask keep theirs."""
        examples = [
            {"sample_id": n, **{key: self.batch[key][n].tolist() for key in ("input_ids", "labels")}}
            for n in range(self.shape.B)
        ]
        table = label_table(examples, _collate, special_ids=())
        sparse = DualCycle(keep=0.5, warmup=0, cycle=1, dense=0)
        gate = ReGate(
            table, schedule=sparse, policy="random", collator=_collate, special_ids=(), visual_ids=()
        )
        self.gated.gate = gate

        def collated() -> dict[str, Tensor]:
            return {key: value.to(self.device) for key, value in gate.collate(examples).items()}

        active = int(gate.select(gate.collate(examples)).sum())
        self.add(WITH_GATE, active, self.gated, collated())
        self.rows[WITH_COLLATION] = Row(lambda: self.gated(**collated()), self.model, self.optimizer)
        self.positions[WITH_COLLATION] = active


def _collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in ("input_ids", "labels")}


def _has_flash_attn() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())
