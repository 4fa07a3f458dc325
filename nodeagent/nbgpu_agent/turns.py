"""The GPU-time scheduler of this node, kept alive: slices are put in and out, and a scheduler that stopped is replaced."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from nbgpu.models import Device

from . import layout
from .live import LiveSlice
from .native import Native, Scheduler
from .reconcile import Account
from .slicedir import repair_use

log = logging.getLogger("nbgpu.agent")
DEAD_NS = 2_000_000_000
CLOSE_SECONDS = 1.0


@dataclass(frozen=True)
class Debt:
    """GPU time that a slice took beyond its share and had not yet waited for when it ended."""

    ns: int
    at_ns: int
    """When it ended, CLOCK_MONOTONIC."""
    milli: int

    def left_ns(self, now_ns: int) -> int:
        """Return what is left of it: a slice that had stayed would have waited meanwhile."""
        return max(0, self.ns - (now_ns - self.at_ns) * self.milli // 1000)


class Turns:
    """Gives the slices of all devices their turns."""

    def __init__(self, native: Native, devices: Iterable[Device]):
        self._native = native
        self._physical = {device.uuid: device.index for device in devices}
        self._scheduler: Scheduler = native.scheduler()
        self._started_ns = time.monotonic_ns()
        self._debts: dict[tuple[str, str, str], Debt] = {}
        """By hub, user and device: who ends a slice and starts another does not begin anew."""

    @staticmethod
    def _mode(live: LiveSlice) -> int:
        return layout.MODE_STRICT if live.slice.mode == "strict" else layout.MODE_BURST

    def add(self, live: LiveSlice) -> None:
        """Schedule a slice on each of its devices."""
        live.entries = []
        live.accounts = {}
        try:
            repair_use(live.tenant.fd)
            for index, part in enumerate(live.full.devices):
                if part.uuid in self._physical:
                    physical = self._physical[part.uuid]
                    entry = self._scheduler.add(live.ctl.fd, live.tenant.fd, index, physical, part.compute_milli, self._mode(live))
                    live.entries.append(entry)
                    debt = self._debts.get(self._debtor(live, part.uuid))
                    if debt is not None and (left_ns := debt.left_ns(time.monotonic_ns())):
                        self._scheduler.bring(entry, left_ns)
            if live.record.parked is not None:
                self.suspend(live, True)
        except OSError as error:  # one slice's file stops no other's turns
            log.error("slice=%s owner=%s gets no turns on the GPU: %s", live.id, live.owner, error.strerror)
            for device in live.ctl.words.device:
                device.gate = layout.GATE_CLOSED

    @staticmethod
    def _debtor(live: LiveSlice, uuid: str) -> tuple[str, str, str]:
        return live.slice.owner.hub, live.slice.owner.user, uuid

    def change(self, live: LiveSlice) -> None:
        """Tell the scheduler of a slice's new shares or mode."""
        for entry, part in zip(live.entries, live.slice.devices, strict=False):
            self._scheduler.set(entry, part.compute_milli, self._mode(live))

    def suspend(self, live: LiveSlice, suspended: bool) -> None:
        """Keep a slice's gates closed, or let it have turns again."""
        for entry in live.entries:
            self._scheduler.suspend(entry, suspended)

    def change_kernels(self, live: LiveSlice) -> None:
        """Tell the scheduler that limits of the slice's kernels are others now (`LiveSlice.set_kernel_limit` has written them)."""
        for entry in live.entries:
            self._scheduler.kernels(entry)

    def remove(self, live: LiveSlice) -> None:
        """Forget a slice, but not what it took beyond its share."""
        now_ns = time.monotonic_ns()
        self._debts = {debtor: debt for debtor, debt in self._debts.items() if debt.left_ns(now_ns)}
        for entry, part in zip(live.entries, live.full.devices, strict=False):
            debtor, debt = self._debtor(live, part.uuid), Debt(self._scheduler.stats(entry).ahead_ns, now_ns, part.compute_milli)
            known = self._debts.get(debtor)
            if debt.ns and (known is None or debt.ns > known.left_ns(now_ns)):
                self._debts[debtor] = debt
            self._scheduler.remove(entry)
        live.entries = []

    def reconcile(self, live: LiveSlice, index: int, computed_ns: int) -> int:
        """Compare what NVML saw of a slice on its `index`-th device since the last look with what it was let do; return the debt, ns."""
        if index >= len(live.entries):
            return 0
        return settle(self._scheduler, live.entries[index], live.accounts, index, computed_ns)

    def keep_alive(self, slices: Iterable[LiveSlice]) -> bool:
        """Replace the scheduler when it gives no sign of life any more; return whether that was so."""
        slices = list(slices)
        now_ns = time.monotonic_ns()
        scheduled = [live for live in slices if live.entries]
        if not scheduled or now_ns - self._started_ns < DEAD_NS:
            return False
        if any(now_ns - live.ctl.words.heartbeat_ns < DEAD_NS for live in scheduled):
            return False
        log.error("The GPU-time scheduler has stopped; a new one takes its place.")
        # A thread that hangs never lets close return: it is left behind.
        closing = threading.Thread(target=self._scheduler.close, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        self._scheduler = self._native.scheduler()
        self._started_ns = now_ns
        for live in slices:
            self.add(live)
        return True

    def cpu_seconds(self) -> float:
        """Return the CPU time of the scheduler's thread."""
        return self._scheduler.totals().cpu_ns / 1e9

    def close(self) -> None:
        """Stop the scheduler; processes fall back at once."""
        self._scheduler.close()


def settle(scheduler: Scheduler, entry: int, accounts: dict[int, Account], key: int, computed_ns: int) -> int:
    """Charge an entry of the scheduler for what it computed beyond what it was let do; return that, ns. A first look only notes."""
    now_ns, held_ns = time.monotonic_ns(), scheduler.stats(entry).held_ns
    account = accounts.setdefault(key, Account(now_ns, held_ns))
    owed_ns = account.look(computed_ns, held_ns, now_ns) if account.now_ns != now_ns else 0
    if owed_ns:
        scheduler.owe(entry, owed_ns)
    return owed_ns
