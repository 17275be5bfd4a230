"""Inner loops that numba compiles: what methods over task vectors do, in one pass over the numbers as they are stored.

A number is taken as its bits: those of bfloat16 are shifted to become float32, those of float32 by nothing. Loops go
over blocks that stay in the smallest cache, and over members outside of entries, so that each becomes vector
instructions; numba fuses no multiplication with an addition, so every step rounds as the torch program's does.
Compiled code is kept on disk by numba. Only `_compiled` imports this file, and only where it is worth it.
"""

import numpy as np
from numba import njit

WIDTH = 1024  # entries of a block
INFINITE = np.uint32(0x7F800000)  # the exponent of what is not finite
NEVER = -1.0  # below every magnitude

compiled = njit(nogil=True, cache=True, error_model="numpy")


@compiled
def widen(stored, shift, bits):
    """Bits of float32 for stored ones; says whether one is not finite."""
    worst = np.uint32(0)
    for i in range(stored.size):
        wide = np.uint32(np.uint32(stored[i]) << shift)
        bits[i] = wide
        worst = max(worst, np.uint32(wide & INFINITE))
    return worst == INFINITE


@compiled
def narrow(bits, shift, stored):
    """The reverse, rounded to the nearest, to even between two; says whether one is not finite."""
    worst = np.uint32(0)
    half = np.uint32(np.uint32(1 << shift) >> 1)
    odd = np.uint32(1 if shift else 0)
    for i in range(stored.size):
        wide = bits[i]
        wide = np.uint32(np.uint32(wide + half - odd + ((wide >> shift) & odd)) >> shift)
        stored[i] = wide
        worst = max(worst, np.uint32(np.uint32(wide << shift) & INFINITE))
    return worst == INFINITE


@compiled
def merge(members, base, kept, below, upto, divisors, factors, weights, scale, out, shift, out_shift):
    """One run: sparse task vectors (or, without a base, the members) are summed or elected, and put on the base.

    members: flat arrays of bits; base: the same, or empty. kept (members, n) uint8: what was chosen at random, or
    empty. below, upto: an entry stays where its magnitude is above the first, not above the second. divisors, factors:
    what is left is divided and multiplied by. weights: see `_compiled.Compiled.weights`. All numbers are float32.
    """
    n, count = out.size, len(members)
    bits = np.empty((count + 2, WIDTH), np.uint32)
    numbers = bits.view(np.float32)
    sums, signs, shares = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    elected, before, after, divide_by, counted, zero = weights
    bad = False
    for start in range(0, n, WIDTH):
        size = min(WIDTH, n - start)
        ground = numbers[count]
        if base.size:
            bad |= widen(base[start : start + size], shift, bits[count])
        for m in range(count):
            tau = numbers[m]
            bad |= widen(members[m][start : start + size], shift, bits[m])
            if base.size:
                for i in range(size):
                    tau[i] -= ground[i]
            if below[m] != NEVER or upto[m] != np.inf:
                low, high = below[m], upto[m]
                for i in range(size):
                    magnitude = abs(tau[i])
                    tau[i] = tau[i] if (magnitude > low) & (magnitude <= high) else np.float32(0)
            if kept.size:
                for i in range(size):
                    tau[i] *= np.float32(kept[m, start + i])
            if divisors[m] != 1:
                for i in range(size):
                    tau[i] /= divisors[m]
            if factors[m] != 1:
                for i in range(size):
                    tau[i] *= factors[m]
        if before.size:
            for m in range(count):
                for i in range(size):
                    numbers[m, i] *= before[m]
        if elected:
            elect(numbers, count, zero, signs, size)
        add_up(numbers, count, after, sums, size)
        if elected:
            for i in range(size):
                sums[i] *= signs[i]
        if divide_by.size:
            share_out(numbers, count, divide_by, counted, sums, shares, size)
        result = numbers[count + 1]
        for i in range(size):
            result[i] = sums[i] * scale
        if base.size:
            for i in range(size):
                result[i] += ground[i]
        bad |= narrow(bits[count + 1], out_shift, out[start : start + size])
    return bad


@compiled
def add_up(numbers, count, weights, sums, size):
    """The weighted sum of members, in their order."""
    for i in range(size):
        sums[i] = numbers[0, i] * weights[0]
    for m in range(1, count):
        for i in range(size):
            sums[i] += numbers[m, i] * weights[m]


@compiled
def elect(numbers, count, zero, signs, size):
    """Elected signs; of every member what has another sign becomes zero, the rest its magnitude."""
    for i in range(size):
        signs[i] = numbers[0, i]
    for m in range(1, count):
        for i in range(size):
            signs[i] += numbers[m, i]
    for i in range(size):
        signs[i] = np.float32(1) if signs[i] > 0 else np.float32(-1) if signs[i] < 0 else zero
    for m in range(count):
        for i in range(size):
            agreeing = numbers[m, i] * signs[i]
            numbers[m, i] = agreeing if agreeing >= 0 else np.float32(0)


@compiled
def share_out(numbers, count, divide_by, counted, sums, shares, size):
    """Divide sums by what agrees: the number of members (``counted``), or the sum of their shares."""
    for i in range(size):
        shares[i] = divide_by[0] if numbers[0, i] > 0 else np.float32(0)
    for m in range(1, count):
        for i in range(size):
            shares[i] += divide_by[m] if numbers[m, i] > 0 else np.float32(0)
    if counted:
        for i in range(size):
            sums[i] /= max(shares[i], np.float32(1))
    else:
        for i in range(size):
            sums[i] /= shares[i] if shares[i] != 0 else np.float32(1)


@compiled
def split(member, base, shift, low, high, likely, found):
    """How many magnitudes (of the member, or of its task vector) lie above ``high``, how many are ``likely``, and how
    many others lie from ``low`` to ``high``, which are put into ``found``; then whether a number is not finite."""
    bits, ground_bits = np.empty(WIDTH, np.uint32), np.empty(WIDTH, np.uint32)
    numbers, ground = bits.view(np.float32), ground_bits.view(np.float32)
    inside = np.empty(WIDTH, np.uint8)
    above = ties = gathered = 0
    bad = False
    for start in range(0, member.size, WIDTH):
        size = min(WIDTH, member.size - start)
        bad |= widen(member[start : start + size], shift, bits)
        if base.size:
            bad |= widen(base[start : start + size], shift, ground_bits)
            for i in range(size):
                numbers[i] -= ground[i]
        for i in range(size):
            numbers[i] = abs(numbers[i])
        higher, equal, between = np.int32(0), np.int32(0), np.int32(0)
        for i in range(size):
            own = numbers[i]
            higher += np.int32(own > high)
            equal += np.int32(own == likely)
            inside[i] = (own >= low) & (own <= high) & (own != likely)
            between += np.int32(inside[i])
        above, ties = above + higher, ties + equal
        if between:
            gathered = gather(numbers, inside, size, found, gathered)
    return above, ties, gathered, bad


@compiled
def gather(numbers, inside, size, found, at):
    """Put what is inside into ``found`` from ``at`` on; returns where the next goes. Most groups of 16 have none."""
    for first in range(0, size, 16):
        last = min(first + 16, size)
        some = np.uint8(0)
        for i in range(first, last):
            some |= inside[i]
        if some:
            for i in range(first, last):
                if inside[i]:
                    found[at] = numbers[i]
                    at += 1
    return at
