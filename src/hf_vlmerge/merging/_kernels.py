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
def split(members, base, shift, limits, counts, found):
    """For each member and each of its brackets ``limits`` (members, brackets, 3) float32, from a lowest to a highest
    value around a likely one: how many magnitudes (of the member or, with a base, of its task vector) lie above it, how
    many are the likely one, and how many others lie in it, into ``counts`` (members, brackets, 3); those others into
    ``found`` (members, brackets, n). Says whether a number is not finite."""
    bits = np.empty((2, WIDTH), np.uint32)
    numbers, ground = bits.view(np.float32)
    inside = np.empty(WIDTH, np.uint8)
    bad = False
    counts[:] = 0
    n = members[0].size
    for start in range(0, n, WIDTH):
        size = min(WIDTH, n - start)
        if base.size:
            bad |= widen(base[start : start + size], shift, bits[1])
        for m in range(len(members)):
            bad |= widen(members[m][start : start + size], shift, bits[0])
            if base.size:
                for i in range(size):
                    numbers[i] -= ground[i]
            for i in range(size):
                numbers[i] = abs(numbers[i])
            for k in range(limits.shape[1]):
                low, high, likely = limits[m, k]
                above, atleast, ties = np.int32(0), np.int32(0), np.int32(0)
                for i in range(size):
                    above += np.int32(numbers[i] > high)
                    atleast += np.int32(numbers[i] >= low)
                    ties += np.int32(numbers[i] == likely)
                own = counts[m, k]
                own[0] += above
                own[1] += ties
                if atleast > above + ties:
                    own[2] = gather(numbers, size, low, high, likely, inside, found[m, k], own[2])
    return bad


@compiled
def gather(numbers, size, low, high, likely, inside, found, at):
    """Put what lies from ``low`` to ``high`` but for the likely value into ``found`` from ``at`` on; returns where the
    next goes. It is little, so flags (``inside``, a place for them) are looked at eight at a time."""
    for i in range(size):
        inside[i] = (numbers[i] >= low) & (numbers[i] <= high) & (numbers[i] != likely)
    inside[size:] = 0
    words = inside.view(np.uint64)
    for word in range(words.size):
        if words[word]:
            for i in range(8 * word, 8 * word + 8):
                if inside[i]:
                    found[at] = numbers[i]
                    at += 1
    return at
