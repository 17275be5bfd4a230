"""Names of dtypes: in safetensors headers, and as recipes write them."""

import torch

from ..errors import MergeError, nearest

SAFETENSORS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):
    SAFETENSORS["F8_E8M0"] = torch.float8_e8m0fnu
if hasattr(torch, "float4_e2m1fn_x2"):
    SAFETENSORS["F4"] = torch.float4_e2m1fn_x2  # two values a byte: the header counts values, torch counts bytes
TO_SAFETENSORS = {dtype: name for name, dtype in SAFETENSORS.items()}

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
FLOATS = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def parse_dtype(name: str) -> torch.dtype:
    """Return the floating dtype that a recipe names (``bfloat16``, ``float16``, ``float32``, ``float64``)."""
    own = _SHORT.get(str(name), str(name).removeprefix("torch."))
    if own not in FLOATS:
        raise MergeError(f"unknown dtype {name!r}{nearest(own, FLOATS)}")
    return FLOATS[own]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_mergeable(dtype: torch.dtype) -> bool:
    """Floating numbers that torch can compute with; integers, booleans and packed formats are only copied."""
    return dtype.is_floating_point and dtype not in (SAFETENSORS.get("F4"), SAFETENSORS.get("F8_E8M0"))


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf, each in its own precision (for 8-bit floats torch does not say)."""
    return bool((values if values.dtype.itemsize > 1 else values.float()).isfinite().all())
