"""Inner loops that numba compiles: what methods over task vectors do, in one pass over the numbers as they are stored.

A number is taken as its bits: those of bfloat16 are shifted to become float32, those of float32 by nothing. Loops go
over blocks that stay in the smallest cache, and over members outside of entries, so that each becomes vector
instructions; numba fuses no multiplication with an addition, so every step rounds as the torch program's does. Sums
start at -0, which changes no number, not even a zero. Shifts are taken modulo 32: a compiler that does not know them to
be below 32 works with 64 bits. Compiled code is kept on disk by numba. Only `_compiled` imports this file, and only
where it is worth it.
"""

import numpy as np
from numba import njit

WIDTH = 1024  # entries of a block
INFINITE = np.uint32(0x7F800000)  # the exponent of what is not finite
LIMIT = np.uint32(31)  # of a shift
NEVER = -1.0  # below every magnitude
PLACES = np.uint64(11)  # bits of a digit
DIGITS = 1 << 11
LAST = np.uint64(DIGITS - 1)

compiled = njit(nogil=True, cache=True, error_model="numpy")


@compiled
def widen(stored, shift, bits):
    """Bits of float32 for stored ones; says whether one is not finite."""
    shift = np.uint32(shift & LIMIT)
    worst = np.uint32(0)
    for i in range(stored.size):
        wide = np.uint32(np.uint32(stored[i]) << shift)
        bits[i] = wide
        worst = max(worst, np.uint32(wide & INFINITE))
    return worst == INFINITE


@compiled
def narrow(bits, shift, stored):
    """The reverse, rounded to the nearest, to even between two; says whether one is not finite."""
    shift = np.uint32(shift & LIMIT)
    worst = np.uint32(0)
    half = np.uint32(np.uint32(1 << shift) >> 1)
    odd = np.uint32(1 if shift else 0)
    for i in range(stored.size):
        wide = bits[i]
        wide = np.uint32(wide + half - odd + ((wide >> shift) & odd))
        stored[i] = np.uint32(wide >> shift)
        worst = max(worst, np.uint32(wide & INFINITE))
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
    bits = np.zeros((count + 4, WIDTH), np.uint32)
    numbers = bits.view(np.float32)
    bad = False
    for start in range(0, out.size, WIDTH):
        here = slice(start, min(start + WIDTH, out.size))
        size = here.stop - start
        ground, signs = numbers[count][:size], numbers[count + 1][:size]
        shares, result = numbers[count + 2][:size], numbers[count + 3][:size]
        if base.size:
            bad |= widen(base[here], shift, bits[count])
        signs[:] = -0.0
        for m in range(count):
            tau = numbers[m][:size]
            bad |= sparse_difference(members[m][here], shift, ground, below[m], upto[m], tau)
            if kept.size:
                choose(tau, kept[m][here])
            if divisors[m] != 1:
                divide(tau, divisors[m])
            if factors[m] != 1:
                multiply(tau, factors[m])
            if before.size:
                multiply(tau, before[m])
            if elected:
                add(signs, tau, np.float32(1))
        result[:] = -0.0
        if elected:
            bad |= elect(signs, zero)
            shares[:] = 0
            for m in range(count):
                share = divide_by[m] if divide_by.size else np.float32(0)
                add_agreeing(result, shares, numbers[m], signs, after[m], share)
            give_signs(result, signs)
            if divide_by.size and counted:
                divide_by_counts(result, shares)
            elif divide_by.size:
                divide_by_shares(result, shares)
        else:
            for m in range(count):
                add(result, numbers[m], after[m])
        if scale != 1:
            multiply(result, scale)
        if base.size:
            add(result, ground, np.float32(1))
        bad |= narrow(bits[count + 3][:size], out_shift, out[here])
    return bad


# Each goes over as many entries as its first array has: one loop, no second index, or it is not made of vector
# instructions.


@compiled
def sparse_difference(stored, shift, ground, below, upto, tau):
    """Stored numbers less those of the base, where the magnitude of that is in between; says whether one that is stored
    is not finite."""
    shift = np.uint32(shift & LIMIT)
    worst = np.uint32(0)
    for i in range(stored.size):
        wide = np.uint32(np.uint32(stored[i]) << shift)
        difference = wide.view(np.float32) - ground[i]
        magnitude = abs(difference)
        tau[i] = difference if (magnitude > below) & (magnitude <= upto) else np.float32(0)
        worst = max(worst, np.uint32(wide & INFINITE))
    return worst == INFINITE


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
def add(a, b, weight):
    for i in range(a.size):
        a[i] += b[i] * weight


@compiled
def elect(sums, zero):
    """Signs in the place of sums. Says whether a sum is no number: infinities of both signs would elect nobody, without
    a word."""
    lost = np.uint8(0)
    for i in range(sums.size):
        lost |= np.uint8(sums[i] != sums[i])
        sums[i] = np.float32(1) if sums[i] > 0 else np.float32(-1) if sums[i] < 0 else zero
    return lost != 0


@compiled
def add_agreeing(sums, shares, a, signs, weight, share):
    """Add the magnitudes of what has the elected sign, and its share where there is any."""
    for i in range(sums.size):
        agreeing = a[i] * signs[i]
        agreeing = agreeing if agreeing >= 0 else np.float32(0)
        sums[i] += agreeing * weight
        shares[i] += share if agreeing > 0 else np.float32(0)


@compiled
def give_signs(a, signs):
    for i in range(a.size):
        a[i] *= signs[i]


@compiled
def divide_by_counts(a, counts):
    for i in range(a.size):
        a[i] /= max(counts[i], np.float32(1))


@compiled
def divide_by_shares(a, shares):
    for i in range(a.size):
        a[i] /= shares[i] if shares[i] != 0 else np.float32(1)


@compiled
def split(members, base, shift, limits, counts, found):
    """For each member and each of its brackets ``limits`` (members, brackets, 3) float32, from a lowest to a highest
    value around a likely one: how many magnitudes (of the member or, with a base, of its task vector) lie above it, how
    many are the likely one, and how many others lie in it, into ``counts`` (members, brackets, 3); those others into
    ``found`` (members, brackets, n + 1). Says whether a number is not finite."""
    bits = np.zeros((2, WIDTH), np.uint32)
    numbers = bits.view(np.float32)
    inside = np.zeros(WIDTH, np.uint8)
    places = np.zeros(WIDTH // 8, np.int64)
    bad = False
    counts[:] = 0
    n = members[0].size
    for start in range(0, n, WIDTH):
        here = slice(start, min(start + WIDTH, n))
        values, ground = numbers[0][: here.stop - start], numbers[1]
        if base.size:
            bad |= widen(base[here], shift, bits[1])
        for m in range(len(members)):
            bad |= magnitudes(members[m][here], shift, ground, values)
            for k in range(limits.shape[1]):
                low, high, likely = limits[m, k]
                above, within, ties = count(values, low, high, likely)
                own = counts[m, k]
                own[0] += above
                own[1] += ties
                if within > ties:
                    own[2] = gather(values, low, high, likely, inside, places, found[m, k], own[2])
    return bad


@compiled
def magnitudes(stored, shift, ground, values):
    """Of stored numbers less those of the base; says whether one that is stored is not finite."""
    shift = np.uint32(shift & LIMIT)
    worst = np.uint32(0)
    for i in range(stored.size):
        wide = np.uint32(np.uint32(stored[i]) << shift)
        values[i] = abs(wide.view(np.float32) - ground[i])
        worst = max(worst, np.uint32(wide & INFINITE))
    return worst == INFINITE


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
def gather(a, low, high, likely, inside, places, found, at):
    """Put what lies from ``low`` to ``high`` but for the likely value into ``found`` from ``at`` on; returns where the
    next goes. It is little, so flags are looked at eight at a time, and nothing is jumped over: no processor guesses
    where it is. ``a`` is the start of a whole block; ``inside`` and ``places`` have room for its flags and for numbers
    of eights."""
    inside[:] = 0
    for i in range(a.size):
        inside[i] = (a[i] >= low) & (a[i] <= high) & (a[i] != likely)
    words = inside.view(np.uint64)
    some = 0
    for word in range(words.size):
        places[some] = word
        some += np.int64(words[word] != 0)
    for place in places[:some]:
        for i in range(8 * place, 8 * place + 8):
            found[at] = a[i]
            at += np.int64(inside[i])
    return at


@compiled
def by_rank(bits, steps, out):
    """``out`` (rows, width) gets of ``steps`` (width,) the one at the rank of each magnitude in its row, of equal ones
    the earlier first: sorted with their columns by digits, the lowest first."""
    width = bits.shape[1]
    keys = np.empty((2, width), np.uint64)
    counts = np.empty((3, DIGITS), np.int32)
    for row in range(bits.shape[0]):
        source, target = keys[0], keys[1]
        counts[:] = 0
        for i in range(width):
            magnitude = np.uint64(bits[row, i] & np.uint32(0x7FFFFFFF))
            source[i] = (magnitude << np.uint64(32)) | np.uint64(i)
            counts[0, magnitude & LAST] += 1
            counts[1, (magnitude >> PLACES) & LAST] += 1
            counts[2, magnitude >> np.uint64(2 * PLACES)] += 1
        for digit in range(3):
            own = counts[digit]
            shift = np.uint64(32 + digit * PLACES)
            if own[(source[0] >> shift) & LAST] == width:
                continue  # all have the same
            before = 0
            for k in range(DIGITS):
                here = own[k]
                own[k] = before
                before += here
            for i in range(width):
                k = (source[i] >> shift) & LAST
                target[own[k]] = source[i]
                own[k] += 1
            source, target = target, source
        for i in range(width):
            out[row, source[i] & np.uint64(0xFFFFFFFF)] = steps[i]
