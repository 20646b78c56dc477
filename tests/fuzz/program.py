"""A decoder program: for every thing that decoders are known to do differently, which way it is done.

`choices.py` lists the ways; shrinking goes to the simplest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from choices import DECODER, LAYER, Weights

KERNELS = ("sdpa_bool", "sdpa", "sdpa_causal", "mha", "mha_weights")
WITH_BIAS = ("sdpa", "scores")
UNSHIFTED = ("unshifted", "classes_second")


@dataclass(frozen=True)
class Layer:
    """The choices of one layer; `choices.LAYER` lists their values."""

    attend: str = "sdpa_bool"
    scores: str = "matmul"
    hide: str = "add"
    softmax: str = "softmax"
    qkv: str = "separate"
    groups: str = "all"
    span: str = "all"
    cap: bool = False
    sinks: str = "none"
    minus: bool = False
    out_gate: str = "none"
    qk_norm: bool = False
    values: str = "own"
    relative: str = "none"
    content_bias: str = "none"
    temper: str = "none"
    talking: bool = False
    twice: str = "none"
    read: str = "none"
    memory: bool = False
    writes: bool = False
    norm: str = "none"
    place: str = "pre"
    mlp: str = "none"
    residual: str = "add"
    dropout: bool = False
    odd: str = "none"
    odd_at: str = "mlp"
    cross: str = "none"
    mix: str = "none"
    mix_at: str = "mlp"

    @property
    def adds_mask(self) -> bool:
        """Whether its attention takes a mask to be added to the scores."""
        by_scores = (
            self.attend == "scores"
            and self.hide == "add"
            and self.softmax not in ("none", "sigmoid", "masked_after")
        )
        return self.attend in ("sdpa", "mha") or by_scores


@dataclass(frozen=True)
class Program:
    """A decoder: its layers, and the choices that it makes once; `choices.DECODER` lists their values.

    seed: of weights and batches.
    """

    layers: tuple[Layer, ...] = (Layer(), Layer())
    seed: int = 0
    width: int = 8
    heads: int = 2
    positions: str = "none"
    rotary_made: str = "outside"
    mask_by: str = "compare"
    additive_by: str = "where"
    second: str = "some"
    labels_are_ids: bool = False
    lowest: str = "finfo"
    padding: str = "right"
    layout: str = "grid"
    streams: str = "one"
    skips: str = "none"
    loops: int = 1
    per_layer: str = "none"
    embed_scale: bool = False
    embed_norm: bool = False
    final_norm: bool = False
    tied: bool = False
    logit_cap: bool = False
    loss: str = "pad_labels"
    memory_by: str = "caller"
    before: str = "none"
    after: str = "none"
    scope: str = "model"
    checkpoint: bool = False
    float32: bool = False
    keep_logits: bool = False
    router_loss: str = "none"
    bucket: int = 0

    @property
    def shifted(self) -> bool:
        """Whether row t - 1 of the logits is paired with label t."""
        return self.loss not in UNSHIFTED

    @property
    def is_mixing(self) -> bool:
        """Whether tokens reach others in another way than by attention."""
        mixes = (self.before, self.after, *(layer.mix for layer in self.layers))
        return any(mix != "none" for mix in mixes) or any(
            layer.cross == "through_memory" for layer in self.layers
        )

    @property
    def crosses(self) -> bool:
        """Whether a layer reads a memory."""
        return any(layer.cross != "none" for layer in self.layers)

    @property
    def sees_ids(self) -> bool:
        """Whether ids reach other tokens than their own by other ways than attention."""
        return self.is_mixing or any(layer.span == "document" for layer in self.layers)

    @property
    def passes_unchanged(self) -> bool:
        """Whether layers are given what those before them return: else what elided positions show is not defined."""
        return self.per_layer != "added" and self.skips == "none"

    @property
    def least(self) -> float:
        """What masks add to hidden scores; what float64 has for it is infinite to a softmax in float32."""
        if self.lowest == "1e4":
            return -1e4
        return torch.finfo(torch.float32 if self.float32 else torch.float64).min

    def to_json(self) -> dict[str, Any]:
        """Every choice that is not the simplest."""
        known = asdict(self) | {"layers": [_differing(layer) for layer in self.layers]}
        return {"layers": known["layers"]} | _differing(self, known)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Program:
        return Program(**values | {"layers": tuple(Layer(**layer) for layer in values["layers"])})


def _differing(chosen: Layer | Program, values: dict[str, Any] | None = None) -> dict[str, Any]:
    values = values or asdict(chosen)
    return {
        field.name: values[field.name]
        for field in fields(chosen)
        if field.name != "layers" and values[field.name] != field.default
    }


def draw(seed: int) -> Program:
    """The program of a seed."""
    source = random.Random(seed)

    def pick(weights: Weights) -> Any:
        return source.choices(list(weights), list(weights.values()))[0]

    def layer() -> Layer:
        return Layer(**{name: pick(weights) for name, weights in LAYER.items()})

    count = source.choices([1, 2, 3], [12, 7, 1])[0]
    layers = [layer() for _ in range(count)]
    if source.random() < 0.4:
        # Alike, but for what makes a layer dense.
        layers = [layers[0]] + [replace(layers[0], mix="none")] * (count - 1)
    if all(layer.mix != "none" for layer in layers):
        layers.append(replace(layers[0], mix="none"))
    chosen = {name: pick(weights) for name, weights in DECODER.items()}
    return settle(Program(tuple(layers), seed, **chosen))


def settle(program: Program) -> Program:
    """The program with every choice that has no meaning beside the others made the simplest one."""
    if not program.positions.startswith("rotary"):
        program = replace(program, rotary_made="outside")
    # A pair of half heads for two softmaxes subtracted, and rotary pairs inside: at least four numbers a head.
    if program.width // program.heads < 4:
        program = replace(program, heads=2)
    if program.skips != "none":
        program = replace(program, streams="one")
    layers: list[Layer] = []
    for layer in program.layers:
        layers.append(_settled(layer, layers[0] if layers else None, program))
    program = replace(program, layers=tuple(layers))
    return program if program.crosses else replace(program, memory_by="caller")


def _settled(layer: Layer, first: Layer | None, program: Program) -> Layer:
    by_scores = layer.talking or layer.twice != "none" or layer.read != "none" or layer.relative == "rows"
    if by_scores and not layer.attend.startswith("mha"):
        layer = replace(layer, attend="scores")
    biased = (
        layer.relative == "added" or layer.content_bias != "none" or program.positions.startswith("alibi")
    )
    if biased and layer.attend not in WITH_BIAS:
        layer = replace(layer, attend="sdpa")
    if layer.attend in KERNELS:
        layer = replace(layer, temper="none", talking=False, twice="none", read="none")
        layer = replace(layer, relative="none" if layer.relative == "rows" else layer.relative)
        layer = replace(layer, scores="matmul", hide="add", softmax="softmax", cap=False, sinks="none")
    elif layer.groups == "enable_gqa":
        layer = replace(layer, groups="expand")
    # Its padding mask says the same to all queries of a sample, which can be to see none of their document's keys.
    if layer.attend == "sdpa_causal" or (layer.attend, layer.span) == ("mha_weights", "document"):
        layer = replace(layer, span="all")
    if layer.attend.startswith("mha"):
        layer = replace(layer, qkv="separate", groups="all", minus=False, qk_norm=False, writes=False)
        layer = replace(
            layer, values="own", out_gate="elements" if layer.out_gate == "heads" else layer.out_gate
        )
    if layer.groups != "all" and layer.qkv in ("chunk", "view", "view_by_head"):
        layer = replace(layer, qkv="split")
    if layer.scores in ("bmm", "transposed") and layer.sinks != "none":
        layer = replace(layer, scores="matmul")
    if layer.softmax in ("none", "sigmoid", "masked_after"):
        layer = replace(layer, hide="where", sinks="none")
    # Its mask is made from what the layers are told, not from a buffer.
    if layer.span == "document" and layer.hide == "tril":
        layer = replace(layer, hide="masked_fill")
    if layer.scores in ("bmm", "transposed") and (layer.talking or layer.relative == "rows"):
        layer = replace(layer, scores="matmul")
    if layer.memory and layer.attend != "mha":
        layer = replace(layer, memory=False)
    return _settled_places(layer, first)


def _settled_places(layer: Layer, first: Layer | None) -> Layer:
    attends = layer.mix == "none" or layer.mix_at != "attention"
    if layer.mlp == "none":
        where = {"mlp": "input"}
        layer = replace(layer, mix_at=where.get(layer.mix_at, layer.mix_at))
        layer = replace(layer, odd_at="attention" if layer.odd_at == "mlp" else layer.odd_at)
    if layer.mix_at == "values" and layer.attend.startswith("mha"):
        layer = replace(layer, mix_at="input")
    if layer.mix == "none":
        layer = replace(layer, mix_at="mlp")
    if layer.odd == "none":
        layer = replace(layer, odd_at="mlp")
    lends = first is not None and _lends(first) and _heads_of_keys(first) == _heads_of_keys(layer)
    if not lends or not attends:
        layer = replace(layer, values="own")
    return layer


def _heads_of_keys(layer: Layer) -> str:
    return layer.groups if layer.groups in ("all", "single") else "half"


def _lends(layer: Layer) -> bool:
    """Whether a layer has keys and values that a later one may take."""
    return not layer.attend.startswith("mha") and (layer.mix == "none" or layer.mix_at != "attention")


def shrink(program: Program) -> Iterator[Program]:
    """Programs with fewer layers, or with choices replaced by the simplest ones; many at a time first."""
    seen: set[Program] = set()
    for simpler in _simpler(program):
        settled = settle(simpler)
        if settled not in seen and _cost(settled) < _cost(program):
            seen.add(settled)
            yield settled


def _cost(program: Program) -> int:
    """How far from simple; every step of shrinking lowers it, so that shrinking ends."""
    return len(_differing(program)) + sum(100 + len(_differing(layer)) for layer in program.layers)


def _simpler(program: Program) -> Iterator[Program]:
    count = len(program.layers)
    yield replace(Program(program.layers, program.seed), loss=program.loss)
    for index in range(count):
        if count > 1:
            yield replace(program, layers=program.layers[:index] + program.layers[index + 1 :])
    for index in range(count):
        yield _with_layer(program, index, Layer())
        yield _with_layer(program, index, program.layers[0])
    for name in DECODER:
        yield replace(program, **{name: getattr(Program(), name)})
    for index in range(count):
        for name in LAYER:
            simplest = getattr(Layer(), name)
            yield _with_layer(program, index, replace(program.layers[index], **{name: simplest}))


def _with_layer(program: Program, index: int, layer: Layer) -> Program:
    layers = list(program.layers)
    layers[index] = layer
    return replace(program, layers=tuple(layers))
