"""What the tests of the formulas share: members near a base, a float64 comparison, and one rounding of bfloat16."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_vlmerge.merging import get_merge_method

MEMBERS = ("a", "b", "c")


def inputs(count=3, shape=(7, 9), dtype=torch.float32, seed=0):
    """Members and base; of a base of order 1 and task vectors of order 0.1."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    members = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]
    return [m.to(dtype) for m in members], base.to(dtype)


def agrees(name, formula, count=3, shape=(7, 9), base=True, **options):
    """The method against ``formula(members, base)`` in float64: to 1e-6 in float32, to one rounding in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        members, start = inputs(count, shape, dtype)
        result = get_merge_method(name)(members, base=start if base else None, members=MEMBERS[:count], **options)
        expected = torch.from_numpy(formula([m.double().numpy() for m in members], start.double().numpy()))
        if dtype == torch.float32:
            torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
        else:
            assert result.dtype == dtype
            step = torch.exp2(expected.abs().clamp(min=2.0**-126).log2().floor() - 7)
            assert ((result.double() - expected).abs() <= step * 0.5001 + 1e-6).all()


def top(values, count):
    """A mask of the ``count`` largest magnitudes and of all that tie with the last of them."""
    if count < 1:
        return np.zeros(values.shape, bool)
    magnitude = np.abs(values)
    return magnitude >= np.sort(magnitude, axis=None)[-count]


def elected_mean(tau, weights=None, divide_by=None):
    """Sum over members of what has the sign of the sum, divided by the sum of ``divide_by`` over these members."""
    weights = weights or [1.0] * len(tau)
    sign = np.sign(sum(tau))
    agree = [np.sign(t) * sign > 0 for t in tau]
    total = sum(w * t * m for w, t, m in zip(weights, tau, agree, strict=True))
    if divide_by is None:
        return total
    share = sum(d * m for d, m in zip(divide_by, agree, strict=True))
    return np.divide(total, share, where=share != 0, out=np.zeros_like(total))


def close(result, expected):
    torch.testing.assert_close(result, torch.tensor(expected, dtype=result.dtype), rtol=0, atol=1e-6)


def peft_merge_utils():
    """peft's merge utilities, without the seconds that importing all of peft takes."""
    found = find_spec("peft")
    if found is None:
        pytest.skip("peft is not here")
    spec = spec_from_file_location("peft_merge_utils", Path(found.origin).parent / "utils" / "merge_utils.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
