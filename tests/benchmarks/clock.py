"""Steps that take turns, their time by parts, and the memory that each holds.

On the CPU, where no allocator keeps count, a memory profile of one more step is added up.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from machine import machine
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile

Forward = Callable[[], Any]
PARTS = ("forward", "backward", "optimizer")
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Medians of one row. first_s: the first step, compilation included. low_ms, high_ms: quartiles of step_ms.

    passes_ms: forward and backward. host_ms: until the last kernel is queued; where a row waits for the device itself,
    that wait is in it. held_mb: the model and the optimizer's state, before the step; peak_mb: the most that is held
    in it, gradients included; saved_mb: what the forward leaves for the backward. norm: of the first step's gradients.
    """

    first_s: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    passes_ms: float
    step_ms: float
    low_ms: float
    high_ms: float
    host_ms: float
    held_mb: float
    peak_mb: float
    saved_mb: float
    loss: float
    norm: float

    @property
    def added_mb(self) -> float:
        """The most that is held beyond the model and the optimizer's state, gradients included."""
        return self.peak_mb - self.held_mb


class Device:
    """Clocks and memory of a device."""

    def __init__(self, name: str) -> None:
        self.name = name

    def mark(self) -> Any:
        if self.name != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.name == "cuda" else 1e3 * (end - begin)

    def wait(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def put(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy a batch to the device without waiting for it."""
        if self.name != "cuda":
            return dict(batch)
        return {key: value.pin_memory().to("cuda", non_blocking=True) for key, value in batch.items()}

    def memory(self, run: Callable[[], object]) -> tuple[float, float]:
        """The MB that `run` and its result hold in the end, and the most meanwhile, beyond what is held before."""
        gc.collect()
        if self.name == "cuda":
            self.wait()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            kept = run()
            self.wait()
            found = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
            del kept
            return found[0] / 1e6, found[1] / 1e6
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = run()
        del kept
        events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return sum(changes) / 1e6, max(accumulate(changes), default=0) / 1e6

    @property
    def dtype(self) -> torch.dtype:
        """What models are computed in."""
        return torch.bfloat16 if self.name == "cuda" else torch.float32

    def describe(self) -> dict[str, str | int]:
        return {"gpu": torch.cuda.get_device_name(), **machine()} if self.name == "cuda" else machine()


@dataclass(frozen=True)
class Row:
    """One way to compute a step. optimizer: of its parameters; rows may share both with others."""

    forward: Forward
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, device: Device) -> list[Any]:
        """Marks of the device around each part."""
        marks = [device.mark()]
        loss = self.forward().loss
        marks.append(device.mark())
        loss.backward()
        marks.append(device.mark())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(device.mark())
        return marks

    def first(self, device: Device) -> tuple[float, float, float]:
        """Seconds of the first step, its loss, and the norm of its gradients."""
        began = time.perf_counter()
        loss = self.forward().loss
        loss.backward()
        device.wait()
        seconds = time.perf_counter() - began
        gradients = [weight.grad.float() for weight in self.model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return seconds, loss.item(), norm

    @property
    def held_mb(self) -> float:
        """The model, trained or frozen, and the optimizer's state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors += [value for value in states if torch.is_tensor(value)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def take_turns(
    rows: Mapping[str, Row],
    device: Device,
    repetitions: int,
    console: Console,
    check: Callable[[str, tuple[float, float], Mapping[str, tuple[float, float]]], None] = lambda *_: None,
) -> dict[str, Timing]:
    """Time all rows in one run, a step of each in turn, each time in another order.

    check: takes a row's name, its loss and gradient norm in its first step, and those of the rows before.
    """
    first_s: dict[str, float] = {}
    known: dict[str, tuple[float, float]] = {}
    for name, row in rows.items():
        first_s[name], loss, norm = row.first(device)
        console.print(f"  {name}: first step {first_s[name]:.1f} s, loss {loss:.5f}, gradients {norm:.5f}")
        check(name, (loss, norm), known)
        known[name] = loss, norm
    ms: dict[str, list[list[float]]] = defaultdict(list)
    host_ms: dict[str, list[float]] = defaultdict(list)
    order = list(rows)
    for repetition in range(repetitions + WARM_UP):
        random.Random(repetition).shuffle(order)
        for name in order:
            device.wait()
            began = time.perf_counter()
            marks = rows[name].step(device)
            queued = 1e3 * (time.perf_counter() - began)
            device.wait()
            if repetition >= WARM_UP:
                host_ms[name].append(queued)
                ms[name].append([device.ms(a, b) for a, b in pairwise(marks)])
    timings = {}
    for name, row in rows.items():
        saved, _ = device.memory(row.forward)
        _, peak = device.memory(lambda row=row: row.step(device))
        memory = row.held_mb, row.held_mb + peak, saved
        timings[name] = _timing(first_s[name], ms[name], host_ms[name], memory, known[name])
    return timings


def _timing(
    first_s: float,
    ms: list[list[float]],
    host_ms: list[float],
    memory: tuple[float, float, float],
    first: tuple[float, float],
) -> Timing:
    forward, backward, optimizer = (statistics.median(part) for part in zip(*ms, strict=True))
    whole = [sum(parts) for parts in ms]
    passes = statistics.median(parts[0] + parts[1] for parts in ms)
    low, _, high = statistics.quantiles(whole, n=4)
    step, host = statistics.median(whole), statistics.median(host_ms)
    return Timing(first_s, forward, backward, optimizer, passes, step, low, high, host, *memory, *first)
