"""GPU time by NVML against GPU time by turns. Pure: two meters in, what is owed out.

A slice that says that nothing of it is outstanding, while what it submitted still runs, is charged nothing for that work, for no charge is
made by a tenant's word, and its silence ends its turn. NVML sees it compute. Once a second the time that NVML saw is compared with the time
for which the scheduler let the slice compute (`SchedStats.held_ns`); what is beyond is owed, and paid from its next turns.

NVML's word is late (a sixth of a second to a second) and rounded, so only sums are compared: of a slice that says what it does, what NVML
has seen so far is never more than what it was let do so far, however late it is.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUNDED_MILLI = 5
"""Of the time: NVML tells whole percents."""
FORGIVEN = 32
"""One part in so many of what was computed: NVML is rough, and the limiter lets small copies and memsets pass."""
SAVED_MOST_NS = 1_500_000_000
"""What a slice was let do and did not is remembered for so long: longer than NVML may be late."""
OWED_LEAST_NS = 5_000_000
"""Less is not worth a charge yet."""


SURCHARGE = 4
"""One part in so many is owed on top: while two slices compute at once the driver goes to and fro between them, which costs both."""


@dataclass
class Account:
    """One slice on one device."""

    now_ns: int
    held_ns: int
    """The scheduler's meter, as last read."""
    balance_ns: int = 0
    """Computed beyond what was held; below 0 the other way round."""

    def look(self, computed_ns: int, held_ns: int, now_ns: int) -> int:
        """Return what the slice owes now, in ns.

        Parameters
        ----------
        computed_ns : int
            What NVML saw it compute since the last look.
        held_ns : int
            The scheduler's meter, which only rises.
        now_ns : int
            CLOCK_MONOTONIC.
        """
        forgiven = (now_ns - self.now_ns) * ROUNDED_MILLI // 1000 + computed_ns // FORGIVEN
        balance = self.balance_ns + computed_ns - (held_ns - self.held_ns) - forgiven
        self.now_ns, self.held_ns = now_ns, held_ns
        owed = balance if balance >= OWED_LEAST_NS else 0
        self.balance_ns = max(balance - owed, -SAVED_MOST_NS)
        return owed + owed // SURCHARGE
