"""Steps that take turns, their time by parts, and the memory that each holds.

On the CPU, where no allocator keeps count, a memory profile of one more step is added up.
"""

from __future__ import annotations

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
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Forward = Callable[[], Any]
PARTS = ("forward", "backward", "optimizer")
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Medians of one row. first_s: the first step, compilation included. low_ms, high_ms: quartiles of step_ms.

    decoder_ms: forward and backward. host_ms: until the last kernel is queued. held_mb: weights, gradients and the
    optimizer's state, before the step; peak_mb: the most that is held in it.
    """

    first_s: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    decoder_ms: float
    step_ms: float
    low_ms: float
    high_ms: float
    host_ms: float
    held_mb: float
    peak_mb: float
    loss: float

    @property
    def activations_mb(self) -> float:
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

    def peak_beyond(self, run: Callable[[], object]) -> float:
        """The most MB that `run` holds beyond what is held before it."""
        if self.name == "cuda":
            self.wait()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            self.wait()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(accumulate(changes), default=0) / 1e6

    def describe(self) -> dict[str, str | int]:
        return {"gpu": torch.cuda.get_device_name(), **machine()} if self.name == "cuda" else machine()


@dataclass(frozen=True)
class Row:
    """One way to compute a step. optimizer: of its own parameters, which rows may share."""

    forward: Forward
    optimizer: torch.optim.Optimizer

    def step(self, device: Device) -> tuple[list[Any], Tensor]:
        """Marks of the device around each part, and the loss. Gradients stay allocated from step to step."""
        marks = [device.mark()]
        loss: Tensor = self.forward().loss
        marks.append(device.mark())
        loss.backward()
        marks.append(device.mark())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        marks.append(device.mark())
        return marks, loss.detach()


def take_turns(
    rows: Mapping[str, Row], device: Device, repetitions: int, console: Console
) -> dict[str, Timing]:
    """Time all rows in one run, a step of each in turn."""
    first_s: dict[str, float] = {}
    losses: dict[str, float] = {}
    for name, row in rows.items():
        began = time.perf_counter()
        losses[name] = row.step(device)[1].item()
        device.wait()
        first_s[name] = time.perf_counter() - began
        console.print(f"  {name}: first step {first_s[name]:.1f} s, loss {losses[name]:.5f}")
    ms: dict[str, list[list[float]]] = defaultdict(list)
    host_ms: dict[str, list[float]] = defaultdict(list)
    for repetition in range(repetitions + WARM_UP):
        for name, row in rows.items():
            device.wait()
            began = time.perf_counter()
            marks, _ = row.step(device)
            queued = 1e3 * (time.perf_counter() - began)
            device.wait()
            if repetition >= WARM_UP:
                host_ms[name].append(queued)
                ms[name].append([device.ms(a, b) for a, b in pairwise(marks)])
    timings = {}
    for name, row in rows.items():
        held = _held(row.optimizer)
        peak = held + device.peak_beyond(lambda row=row: row.step(device))
        timings[name] = _timing(first_s[name], ms[name], host_ms[name], held, peak, losses[name])
    return timings


def _held(optimizer: torch.optim.Optimizer) -> float:
    """MB of the weights that are trained, their gradients and the optimizer's state."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None)]
    tensors += [
        value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def _timing(
    first_s: float, ms: list[list[float]], host_ms: list[float], held: float, peak: float, loss: float
) -> Timing:
    forward, backward, optimizer = (statistics.median(part) for part in zip(*ms, strict=True))
    whole = [sum(parts) for parts in ms]
    decoder = statistics.median(parts[0] + parts[1] for parts in ms)
    low, _, high = statistics.quantiles(whole, n=4)
    step, host = statistics.median(whole), statistics.median(host_ms)
    return Timing(first_s, forward, backward, optimizer, decoder, step, low, high, host, held, peak, loss)
