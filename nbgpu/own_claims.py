"""Claims that people write themselves: what is asked for in words that mean something else here. Pure."""

from __future__ import annotations

from decimal import Decimal

from .claims import DRIVER, exact_quantity
from .loose import Json, as_dict, as_dicts
from .quantities import WHOLE_MILLI, format_share

LEAST_MILLI = 2
"""Least share of a claim of one's own: who writes 1 means a whole GPU."""


def share_problem(claim: Json) -> str | None:
    """Return, in words, what is wrong with the share of a GPU's time that a claim asks for; None where nothing is.

    Kubernetes rounds ``compute: "0.25"`` up to 1, a thousandth of a GPU, and says nothing.

    Parameters
    ----------
    claim : dict
        A ResourceClaim, as the API server shows it, malformed ones too.
    """
    for asked in _requests(claim):
        if asked.get("deviceClassName") != DRIVER:
            continue
        value = as_dict(as_dict(asked.get("capacity")).get("requests")).get("compute")
        if value is None:
            continue
        try:
            exact = exact_quantity(value)
        except ValueError:
            continue  # the API server takes none such
        if exact == exact.to_integral_value() and exact >= LEAST_MILLI:
            continue
        meant = exact * WHOLE_MILLI
        whole = 0 < meant <= WHOLE_MILLI and meant == meant.to_integral_value()
        hint = f' For {format_share(int(meant))} write "{int(meant)}".' if whole else ""
        return (
            f"it asks for compute {_plain(exact)}, which Kubernetes takes for {_thousandths(exact)} of a GPU's time: "
            f'compute is in thousandths, "250" is a quarter and "1000" the whole GPU.{hint}'
        )
    return None


def _thousandths(exact: Decimal) -> str:
    milli = max(1, int(exact.to_integral_value(rounding="ROUND_CEILING")))
    return "a thousandth" if milli == 1 else f"{milli} thousandths"


def _plain(exact: Decimal) -> str:
    return format(exact.normalize(), "f")


def _requests(claim: Json) -> list[Json]:
    found: list[Json] = []
    for one in as_dicts(as_dict(as_dict(claim.get("spec")).get("devices")).get("requests")):
        found += [as_dict(one.get("exactly")), *as_dicts(one.get("firstAvailable"))]
    return found
