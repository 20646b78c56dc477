"""Which kernel computes variable-length attention where, decided from facts alone (nothing runs here).

Shapes: Hq query heads, Hk key heads, d width of a query and key, dv width of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_TORCH_GROUPS_HEADS_SINCE = (2, 12)


@dataclass(frozen=True)
class Kernel:
    """`repeat_keys`: the kernel wants one key head per query head, so that groups are repeated and summed."""

    name: Literal["flash_attn", "torch"]
    repeat_keys: bool


def choose_kernel(
    flash_attn_installed: bool, torch_version: tuple[int, int], query_heads: int, key_heads: int
) -> Kernel:
    """Choose the CUDA kernel of one attention; what no kernel takes was refused by `supported` before."""
    if flash_attn_installed:
        return Kernel("flash_attn", repeat_keys=False)
    grouped = query_heads != key_heads
    return Kernel("torch", repeat_keys=grouped and torch_version < _TORCH_GROUPS_HEADS_SINCE)


def supported(
    device_type: str,
    dtype: torch.dtype,
    causal: bool,
    window: int,
    mask: object,
    dropout_p: float,
    d: int,
    dv: int,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Return None when `regate_fx::varlen_attention` computes this exactly, else one sentence saying why not.

    device_type: "meta", where nothing runs, is judged as CUDA, for which weights are planned.
    mask: None or False where the attention has no mask tensor, anything else where it has one.
    capability: of the CUDA device; None reads it from the current device where there is one.
    """
    if device_type == "cpu":
        return None if dtype in _CPU_DTYPES else f"the CPU kernel does not take {dtype}"
    if device_type not in ("cuda", "meta"):
        return f"there is no variable-length attention kernel for device type {device_type!r}"
    if dtype not in _CUDA_DTYPES:
        return f"the CUDA kernels take bfloat16 and float16, not {dtype}"
    if mask is not None and mask is not False:
        return "the CUDA kernels take no mask tensor"
    if window:
        # Packed rows are closer together than the positions they came from: the kernels' own window would
        # reach too far back.
        return "the CUDA kernels measure a window in packed rows, not in original positions"
    if dropout_p:
        return "the CUDA kernels draw dropout from the device's global generator, not from a given seed"
    return _width_reason(d, dv) or _capability_reason(capability)


def _width_reason(d: int, dv: int) -> str | None:
    if d != dv:
        return f"the CUDA kernels need values as wide as keys, here {dv} and {d}"
    if d > 256 or d % 8:
        return f"the CUDA kernels take head widths up to 256 in steps of 8, not {d}"
    return None


def _capability_reason(capability: tuple[int, int] | None) -> str | None:
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    if capability is not None and capability < (8, 0):
        have = ".".join(map(str, capability))
        return f"the CUDA kernels need compute capability 8.0 or newer, the device has {have}"
    return None


@cache
def flash_attn_installed() -> bool:
    return find_spec("flash_attn") is not None


@cache
def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
