"""Draw the pictures of docs/enforcement.md: parts of a GPU's time, second by second, with nbgpu's turns and by the driver alone.

*Simulated*, in virtual time: the scheduler's own policy and an event-driven GPU (tests/model/gpu_sim.c). Run again when the policy changes.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "model")]

from gpu_sim import Gpu, Sim, Work, build  # noqa: E402

SECONDS = 30
SETTLE_SECONDS = 8
WIDTH, HEIGHT, LEFT, TOP = 380, 200, 46, 34
COLOURS = ("#1f77b4", "#d95f02", "#2a9d4a", "#8e44ad", "#b8860b", "#c0392b", "#16a085", "#7f8c8d")


@dataclass(frozen=True)
class Picture:
    """Two graphs side by side of the same load: with nbgpu, and without."""

    name: str
    title: str
    works: Sequence[Work]
    labels: Sequence[str]


PICTURES = (
    Picture(
        "shares",
        "Four notebooks with 10, 20, 30 and 40 % that compute without pause (GPU kernels of 2 ms)",
        [Work(milli, kernel_ms=2.0) for milli in (100, 200, 300, 400)],
        ["10 %", "20 %", "30 %", "40 %"],
    ),
    Picture(
        "greedy",
        "Two slices of one half each; in the second, four processes compute (GPU kernels of 2 ms)",
        [Work(500, kernel_ms=2.0), Work(500, kernel_ms=2.0, processes=4)],
        ["one process", "four processes"],
    ),
    Picture(
        "strict",
        "A strict slice of 30 % alone on the GPU",
        [Work(300, kernel_ms=2.0, strict=True)],
        ["strict 30 %"],
    ),
)


def play(lib: object, works: Sequence[Work], limited: bool) -> list[list[float]]:
    """Return each second's parts of the GPU's time in percent, a list for each slice."""
    with Sim(lib, Gpu(), list(works), limited) as sim:  # type: ignore[arg-type]
        sim.run(SETTLE_SECONDS)
        seconds = [sim.run(1.0) for _ in range(SECONDS)]
    return [list(one) for one in zip(*seconds, strict=True)]


def graph(x: int, title: str, lines: Sequence[Sequence[float]], due: Sequence[float], labels: Sequence[str]) -> str:
    """Return one graph: time to the right, percent of the GPU upwards; thin dashes where each line belongs."""

    def across(second: float) -> float:
        return x + LEFT + second / SECONDS * WIDTH

    def up(percent: float) -> float:
        return TOP + HEIGHT - percent / 100 * HEIGHT

    parts = [f'<text x="{x + LEFT}" y="{TOP - 10}" class="t">{title}</text>']
    for percent in (0, 25, 50, 75, 100):
        parts.append(f'<line x1="{across(0)}" x2="{across(SECONDS)}" y1="{up(percent)}" y2="{up(percent)}" class="g"/>')
        parts.append(f'<text x="{x + LEFT - 6}" y="{up(percent) + 4}" class="a" text-anchor="end">{percent} %</text>')
    for second in (0, 10, 20, 30):
        parts.append(f'<text x="{across(second)}" y="{TOP + HEIGHT + 16}" class="a" text-anchor="middle">{second} s</text>')
    heights = apart([up(line[-1]) if label else 0.0 for line, label in zip(lines, labels, strict=True)])
    for line, target, label, height, colour in zip(lines, due, labels, heights, COLOURS, strict=False):
        points = " ".join(f"{across(i + 0.5):.1f},{up(value):.1f}" for i, value in enumerate(line))
        parts.append(f'<line x1="{across(0)}" x2="{across(SECONDS)}" y1="{up(target)}" y2="{up(target)}" class="d" stroke="{colour}"/>')
        parts.append(f'<polyline points="{points}" class="l" stroke="{colour}"/>')
        parts.append(f'<text x="{across(SECONDS) + 6}" y="{height + 4:.1f}" class="a" fill="{colour}">{label}</text>')
    return "\n".join(parts)


def apart(heights: Sequence[float], least: float = 13) -> list[float]:
    """Return the heights of labels, moved so that none lies over another."""
    moved = list(heights)
    for above, below in itertools.pairwise(sorted(range(len(heights)), key=lambda i: heights[i])):
        moved[below] = max(moved[below], moved[above] + least)
    return moved


def draw(picture: Picture, limited: Sequence[Sequence[float]], alone: Sequence[Sequence[float]]) -> str:
    """Return the picture as SVG."""
    due = [work.milli / 10 for work in picture.works]
    step = LEFT + WIDTH + 100
    overlap = len({round(line[-1]) for line in alone}) < len(alone)
    together = [("all alike" if i == 0 else "") if overlap else label for i, label in enumerate(picture.labels)]
    style = (
        ".t{font:600 13px sans-serif}.a{font:11px sans-serif}.g{stroke:#ddd}.d{stroke-dasharray:3 4;opacity:.7}.l{fill:none;stroke-width:2}"
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * step} {TOP + HEIGHT + 50}" role="img" aria-label="{picture.title}">
<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>
{graph(0, "with nbgpu (dashes: what is due)", limited, due, picture.labels)}
{graph(step, "the driver alone", alone, due, together)}
<text x="{LEFT}" y="{TOP + HEIGHT + 38}" class="a">{picture.title}. Simulated, in 1-s windows.</text>
</svg>
"""


def main() -> None:
    """Write docs/images/enforcement-*.svg, and print each picture's means."""
    with tempfile.TemporaryDirectory() as folder:
        lib = build(Path(folder))
        for picture in PICTURES:
            limited, alone = (play(lib, picture.works, limited) for limited in (True, False))
            (ROOT / "docs" / "images" / f"enforcement-{picture.name}.svg").write_text(draw(picture, limited, alone))
            means = [" / ".join(f"{sum(line) / len(line):.1f}" for line in lines) for lines in (limited, alone)]
            print(f"{picture.name:10} with nbgpu {means[0]}   driver alone {means[1]}")


if __name__ == "__main__":
    main()
