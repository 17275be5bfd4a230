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
    Says whether one that was read or made is not finite.
    """
    elected, before, after, divide_by, counted, zero = weights
    count = len(members)
    bits = np.empty((count + 3, WIDTH), np.uint32)
    numbers = bits.view(np.float32)
    ground, signs = numbers[count], numbers[count + 1]
    result = numbers[count + 2]
    bad = False
    for start in range(0, out.size, WIDTH):
        here = slice(start, min(start + WIDTH, out.size))
        size = here.stop - start
        if base.size:
            bad |= widen(base[here], shift, bits[count])
        for m in range(count):
            tau = numbers[m][:size]
            bad |= widen(members[m][here], shift, bits[m])
            if base.size:
                subtract(tau, ground)
            if below[m] != NEVER or upto[m] != np.inf:
                trim(tau, below[m], upto[m])
            if kept.size:
                choose(tau, kept[m][here])
            if divisors[m] != 1:
                divide(tau, divisors[m])
            if factors[m] != 1:
                multiply(tau, factors[m])
            if before.size:
                multiply(tau, before[m])
        if elected:
            bad |= elect(numbers, count, zero, signs[:size])
        start_sum(result[:size], numbers[0], after[0])
        for m in range(1, count):
            add(result[:size], numbers[m], after[m])
        if elected:
            give_signs(result[:size], signs)
        if divide_by.size:
            share_out(numbers, count, divide_by, counted, result[:size], signs)
        if scale != 1:
            multiply(result[:size], scale)
        if base.size:
            add(result[:size], ground, np.float32(1))
        bad |= narrow(bits[count + 2][:size], out_shift, out[here])
    return bad


# Each goes over as many entries as its first array has: one loop, no second index, or it is not made of vector
# instructions.


@compiled
def subtract(a, b):
    for i in range(a.size):
        a[i] -= b[i]


@compiled
def trim(a, below, upto):
    for i in range(a.size):
        magnitude = abs(a[i])
        a[i] = a[i] if (magnitude > below) & (magnitude <= upto) else np.float32(0)


@compiled
def choose(a, kept):
    for i in range(a.size):
        a[i] *= np.float32(kept[i])


@compiled
def divide(a, by):
    for i in range(a.size):
        a[i] /= by


@compiled
def multiply(a, by):
    for i in range(a.size):
        a[i] *= by


@compiled
def start_sum(a, b, weight):
    for i in range(a.size):
        a[i] = b[i] * weight


@compiled
def add(a, b, weight):
    for i in range(a.size):
        a[i] += b[i] * weight


@compiled
def give_signs(a, signs):
    for i in range(a.size):
        a[i] *= signs[i]


@compiled
def elect(numbers, count, zero, signs):
    """Elected signs; of every member what has another sign becomes zero, the rest its magnitude. Says whether a sum is
    no number: infinities of both signs would elect nobody, without a word."""
    lost = np.uint8(0)
    start_sum(signs, numbers[0], np.float32(1))
    for m in range(1, count):
        add(signs, numbers[m], np.float32(1))
    for i in range(signs.size):
        lost |= np.uint8(signs[i] != signs[i])
        signs[i] = np.float32(1) if signs[i] > 0 else np.float32(-1) if signs[i] < 0 else zero
    for m in range(count):
        agree(numbers[m][: signs.size], signs)
    return lost != 0


@compiled
def agree(a, signs):
    for i in range(a.size):
        agreeing = a[i] * signs[i]
        a[i] = agreeing if agreeing >= 0 else np.float32(0)


@compiled
def share_out(numbers, count, divide_by, counted, sums, shares):
    """Divide sums by what agrees: the number of members (``counted``), or the sum of their shares."""
    shares[:] = 0
    for m in range(count):
        add_share(shares[: sums.size], numbers[m], divide_by[m])
    if counted:
        divide_by_counts(sums, shares)
    else:
        divide_by_shares(sums, shares)


@compiled
def divide_by_counts(a, counts):
    for i in range(a.size):
        a[i] /= max(counts[i], np.float32(1))


@compiled
def divide_by_shares(a, shares):
    for i in range(a.size):
        a[i] /= shares[i] if shares[i] != 0 else np.float32(1)


@compiled
def add_share(shares, a, share):
    for i in range(shares.size):
        shares[i] += share if a[i] > 0 else np.float32(0)


@compiled
def split(members, base, shift, limits, counts, found):
    """For each member and each of its brackets ``limits`` (members, brackets, 3) float32, from a lowest to a highest
    value around a likely one: how many magnitudes (of the member or, with a base, of its task vector) lie above it, how
    many are the likely one, and how many others lie in it, into ``counts`` (members, brackets, 3); those others into
    ``found`` (members, brackets, n). Says whether a number is not finite."""
    bits = np.empty((2, WIDTH), np.uint32)
    numbers = bits.view(np.float32)
    inside = np.empty(WIDTH, np.uint8)
    bad = False
    counts[:] = 0
    n = members[0].size
    for start in range(0, n, WIDTH):
        here = slice(start, min(start + WIDTH, n))
        values = numbers[0][: here.stop - start]
        if base.size:
            bad |= widen(base[here], shift, bits[1])
        for m in range(len(members)):
            bad |= widen(members[m][here], shift, bits[0])
            if base.size:
                subtract(values, numbers[1])
            magnitudes(values)
            for k in range(limits.shape[1]):
                low, high, likely = limits[m, k]
                above, within, ties = count(values, low, high, likely)
                own = counts[m, k]
                own[0] += above
                own[1] += ties
                if within > ties:
                    own[2] = gather(values, low, high, likely, inside, found[m, k], own[2])
    return bad


@compiled
def magnitudes(a):
    for i in range(a.size):
        a[i] = abs(a[i])


@compiled
def count(a, low, high, likely):
    """How many lie above ``high``, how many from ``low`` to it, and how many are the likely value."""
    above, atleast, ties = np.int32(0), np.int32(0), np.int32(0)
    for i in range(a.size):  # numba adds in 64 bits unless it is told at each step
        above = np.int32(above + np.int32(a[i] > high))
        atleast = np.int32(atleast + np.int32(a[i] >= low))
        ties = np.int32(ties + np.int32(a[i] == likely))
    return above, atleast - above, ties


@compiled
def gather(a, low, high, likely, inside, found, at):
    """Put what lies from ``low`` to ``high`` but for the likely value into ``found`` from ``at`` on; returns where the
    next goes. It is little, so flags (``inside``, a place for them) are looked at eight at a time."""
    inside[:] = 0
    for i in range(a.size):
        inside[i] = (a[i] >= low) & (a[i] <= high) & (a[i] != likely)
    words = inside.view(np.uint64)
    for word in range(words.size):
        if words[word]:
            for i in range(8 * word, 8 * word + 8):
                if inside[i]:
                    found[at] = a[i]
                    at += 1
    return at
