"""`make simulate`: where byokeeps of some sizes bend: docs/scaling.md's table, and its picture."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from docs.simulate import BENDS_AT, Size, bend, simulate

SVG = Path(__file__).with_name("scaling.svg")
RATES = (1, 3, 10, 30, 100, 300, 1000, 3000)
"""Reviews a second that are asked for."""
SIZES = (
    Size("one of each"),
    Size("two of each", 2, 2, 2, 16, 32, 2, 4),
    Size("four of each, more places", 4, 4, 4, 256, 256, 8, 8),
    Size("sixteen, eight keyvaults", 16, 8, 16, 1000, 1000, 16, 32),
    Size("four such halves", 8, 4, 8, 1000, 1000, 16, 16, partitions=4),
)


def table(delays: dict[str, list[float]]) -> str:
    """The rows of docs/scaling.md."""
    rates = " | ".join(f"{rate:,}/s" for rate in RATES)
    lines = [f"| | {rates} | bends at | full first |", f"| --- |{' --- |' * (len(RATES) + 2)}"]
    for size in SIZES:
        shown = " | ".join(cell(delay) for delay in delays[size.name])
        rate, above = bend(size)
        lines.append(f"| {size.name} | {shown} | {rate:,.0f}/s | {above.fullest} |")
    return "\n".join(lines) + "\n"


def cell(delay: float) -> str:
    """What the table says of a delay: nothing where reviews pile up."""
    return f"{delay:.2f} s" if delay < BENDS_AT else "-"


def picture(delays: dict[str, list[float]]) -> str:
    """The same as lines: rate to the right, delay upwards, both logarithmic."""

    def x(rate: float) -> float:
        return 70 + 150 * math.log10(rate)

    def y(delay: float) -> float:
        return 250 - 100 * math.log10(min(max(delay, 0.1), 10) / 0.1)

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-family="sans-serif"'
        ' font-size="12"><rect width="760" height="300" fill="white"/>'
    ]
    for rate in RATES:
        lines.append(f'<path d="M{x(rate):.0f} 50V250" stroke="#ddd"/>')
        lines.append(f'<text x="{x(rate):.0f}" y="268" text-anchor="middle">{rate:,}</text>')
    for delay in (0.1, 1, 10):
        lines.append(f'<path d="M70 {y(delay):.0f}H592" stroke="#ddd"/>')
        lines.append(f'<text x="62" y="{y(delay) + 4:.0f}" text-anchor="end">{delay} s</text>')
    lines.append('<text x="330" y="290" text-anchor="middle">reviews a second</text>')
    lines.append('<text x="70" y="30">what byokeep adds to 1 review of 100</text>')
    for number, (name, values) in enumerate(delays.items()):
        points = " ".join(
            f"{x(rate):.0f},{y(delay):.0f}" for rate, delay in zip(RATES, values, strict=True)
        )
        colour = ("#c0392b", "#d68910", "#239b56", "#2471a3", "#7d3c98")[number % 5]
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="600" y="{70 + 20 * number}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Simulate every size at every rate; print the table, write the picture."""
    delays = {size.name: [simulate(size, rate).p99 for rate in RATES] for size in SIZES}
    SVG.write_text(picture(delays))
    sys.stdout.write(table(delays))


if __name__ == "__main__":
    main()
