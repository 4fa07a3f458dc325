"""What is left of a device, and what it is good for: prices from the cutting-stock relaxation of the sizes that arrive.

The relaxation cuts devices into the arriving sizes with as few devices as possible; its dual gives each size a price, and a remainder is
worth the dearest sizes that fit in it together. A remainder that arriving sizes fill exactly keeps its worth, an odd one loses it.

Source: P. C. Gilmore and R. E. Gomory, "A Linear Programming Approach to the Cutting-Stock Problem", Operations Research 9, 1961:
columns made as they are needed by a knapsack.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import numpy as np
import numpy.typing as npt

from nbgpu.quantities import WHOLE_MILLI

from .fleet import Ints

_MOST_STEPS = 200
_SMALL = 1e-9
Floats = npt.NDArray[np.float64]


def worth(shares: Mapping[int, int]) -> Ints:
    """Return what each remainder from 0 to a whole device is worth, in milli-GPU; a whole one is worth 1000.

    Parameters
    ----------
    shares : mapping
        Of the sizes below a whole device (milli-GPU) how often each arrives, in any unit.
    """
    sizes = np.array(sorted(size for size, share in shares.items() if 0 < size < WHOLE_MILLI and share > 0), np.int64)
    if not len(sizes):
        return np.arange(WHOLE_MILLI + 1, dtype=np.int64) // WHOLE_MILLI * WHOLE_MILLI
    step = gcd(WHOLE_MILLI, *sizes.tolist())
    units, capacity = sizes // step, WHOLE_MILLI // step
    amounts = np.array([shares[size] for size in sizes.tolist()], np.float64)
    prices = _prices(units, amounts / amounts.sum(), capacity)
    best, _ = _knapsack(units, prices, capacity)
    found = np.rint(best / best[-1] * WHOLE_MILLI).astype(np.int64)
    return found[np.arange(WHOLE_MILLI + 1) // step]


def _prices(units: Ints, amounts: Floats, capacity: int) -> Floats:
    """Return the dual price of each size, in devices."""
    cuts: Floats = np.zeros((len(units), len(units)), np.float64)
    """[size, cut]: how often a cut has the size."""
    np.fill_diagonal(cuts, capacity // units)
    for _ in range(_MOST_STEPS):
        prices: Floats = np.linalg.solve(np.transpose(cuts), np.ones(len(units))).astype(np.float64)
        best, counts = _knapsack(units, prices, capacity)
        if best[-1] <= 1 + _SMALL:
            break
        used, into = np.linalg.solve(cuts, amounts), np.linalg.solve(cuts, counts)
        rates = np.where(into > _SMALL, np.maximum(used, 0) / np.where(into > _SMALL, into, 1), np.inf)
        cuts[:, int(np.argmin(rates))] = counts
    return np.maximum(np.linalg.solve(np.transpose(cuts), np.ones(len(units))), 0)


def _knapsack(units: Ints, prices: Floats, capacity: int) -> tuple[Floats, Floats]:
    """Return the best worth within each capacity, and how often each size is in the best for all of it."""
    best, last = np.zeros(capacity + 1), np.full(capacity + 1, -1)
    for room in range(1, capacity + 1):
        fits = units <= room
        best[room], last[room] = best[room - 1], -1
        if fits.any():
            values = np.where(fits, best[np.maximum(room - units, 0)] + prices, -1.0)
            choice = int(np.argmax(values))
            if values[choice] > best[room] + _SMALL:
                best[room], last[room] = values[choice], choice
    counts, room = np.zeros(len(units)), capacity
    while room > 0:
        if last[room] < 0:
            room -= 1
        else:
            counts[last[room]] += 1
            room -= int(units[last[room]])
    return best, counts
