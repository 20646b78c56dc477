"""Which kernel computes variable-length attention where, decided from facts alone (nothing runs here).

Shapes: Hq query heads, Hk key heads, d width of a query and key, dv width of a value.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.attention

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLEX_DTYPES = (*_FLASH_DTYPES, torch.float32)


# "auto": the first of the others that computes an attention. "model": the operators that the model is written with.
Preferred = Literal["auto", "flash_attn", "torch", "flex", "model"]
Kernel = Literal["flash_attn", "torch", "flex"]
_WORDS: dict[Kernel, str] = {
    "flash_attn": "flash_attn", "torch": "torch.nn.attention.varlen", "flex": "FlexAttention",
}  # fmt: skip


def choose_kernel(
    prefer: Preferred, dtype: torch.dtype, window: int, mask: object, d: int, dv: int, softcap: float = 0.0
) -> Kernel | None:
    """Which CUDA kernel computes an attention, the preferred one if it can; None where none can.

    Packed rows are closer together than the positions they came from: a flash kernel's own window, which counts rows,
    would reach too far back. torch's knows of no cap. "auto" takes it before flash_attn where the user has put another
    flash attention in its place.
    """
    is_plain = window == 0 and (mask is None or mask is False)
    by_flash = is_plain and dtype in _FLASH_DTYPES and d == dv and d <= 256 and d % 8 == 0
    by_flex = _why_not_flex(dtype, d, dv) is None
    if by_flash and not (by_flex and prefer == "flex"):
        by_torch = prefer == "torch" or (prefer == "auto" and activated_flash_attention() is not None)
        if flash_attn_installed() and (softcap or not by_torch):
            return "flash_attn"
        if not softcap:
            return "torch"
    return "flex" if by_flex else None


@cache
def torch_groups_heads() -> bool:
    """Whether torch's kernel takes fewer key heads than query heads, as it does from about 2.12 on."""
    import torch.nn.attention.varlen  # registers the operator

    schema = torch.ops.torch_attn._varlen_attn.default._schema
    return any(argument.name == "enable_gqa" for argument in schema.arguments)


def supported(
    device_type: str,
    dtype: torch.dtype,
    causal: bool,
    window: int,
    mask: object,
    dropout_p: float,
    d: int,
    dv: int,
    softcap: float = 0.0,
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
    if dropout_p:
        return "the CUDA kernels draw dropout from the device's global generator, not from a given seed"
    if choose_kernel("auto", dtype, window, mask, d, dv, softcap) is None:
        return _why_not_flex(dtype, d, dv)
    return _capability_reason(capability)


def _why_not_flex(dtype: torch.dtype, d: int, dv: int) -> str | None:
    if dtype not in _FLEX_DTYPES:
        return f"the CUDA kernels do not take {dtype}"
    if min(d, dv) < 16 or max(d, dv) > 256:
        return f"FlexAttention takes head widths from 16 to 256, not {d} and {dv}"
    return None


def kernel_name(
    prefer: Preferred, dtype: torch.dtype, window: int, mask: object, d: int, dv: int, softcap: float = 0.0
) -> str:
    """What computes an attention on CUDA that `supported` lets pass, in words."""
    kernel = choose_kernel(prefer, dtype, window, mask, d, dv, softcap)
    assert kernel is not None
    activated = activated_flash_attention() if kernel == "torch" else None
    return f"{_WORDS[kernel]} ({activated})" if activated else _WORDS[kernel]


def _capability_reason(capability: tuple[int, int] | None) -> str | None:
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    if capability is not None and capability < (8, 0):
        have = ".".join(map(str, capability))
        return f"the CUDA kernels need compute capability 8.0 or newer, the device has {have}"
    return None


@cache
def flash_attn_installed() -> bool:
    """Whether flash_attn 2 is. Version 4 is a package of the same name, without this interface."""
    spec = find_spec("flash_attn")
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    return any((Path(folder) / "flash_attn_interface.py").exists() for folder in folders)


def activated_flash_attention() -> str | None:
    """What `torch.nn.attention.activate_flash_attention_impl` put in the place of torch's kernel: "FA3", "FA4"."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


@cache
def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
