"""Where a request goes.

What the service uses of it is here: `best_fit` (the rule), `buckets` (the same place without looking at each device) and `moves` (whose
move would let somebody in).

The other rules need NumPy and are imported by whoever uses them: `fleet` (nodes and devices as integers), `chooser` (which place, kept up
to date by what changes), `rules` (how good a place is), `values` (what free GPU is worth to those who are likely to ask), `demand` (who
that is), `remainders` (what is left of a device, and what it is good for).
"""

from .best_fit import DEFAULT_POLICY, Place, Policy, Room, family, nearest, of_use, order, place, score
from .buckets import Buckets, of_each_kind
from .moves import Move, one_move

__all__ = [
    "DEFAULT_POLICY",
    "Buckets",
    "Move",
    "Place",
    "Policy",
    "Room",
    "family",
    "nearest",
    "of_each_kind",
    "of_use",
    "one_move",
    "order",
    "place",
    "score",
]
