"""What axe (https://www.dequelabs.com/axe) finds wrong for people who cannot see or point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

AXE = Path(__file__).resolve().parent.parent / "labextension" / "node_modules" / "axe-core" / "axe.min.js"
RUN = """async ([within, without]) => {
  const found = await axe.run({ include: within, exclude: without }, { resultTypes: ["violations"] });
  return found.violations.flatMap((one) => one.nodes.map((node) => [one.id, one.impact, node.target.join(" "), node.failureSummary]));
}"""


def violations(page: Page, within: str = "html", without: tuple[str, ...] = ()) -> list[Any]:
    """Return the violations of any of axe's rules in a part of a page: rule, impact, where, how to mend it.

    Parameters
    ----------
    within, without : str
        CSS selectors.
    """
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: make setup")
    if not page.evaluate("'axe' in window"):
        page.add_script_tag(path=str(AXE))
    return page.evaluate(RUN, [[within], list(without)])
