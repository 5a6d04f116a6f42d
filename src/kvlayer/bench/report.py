"""Figures for people: a table, and a picture of how near each figure comes to its ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvlayer.bench.measure import Row

__all__ = ["picture", "table"]


def table(rows: Sequence[Row]) -> list[str]:
    """One line a figure, under a heading."""
    cells = [("figure", "value", "ceiling", "ratio", "CPU s/GB"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    cpu = row.cpu_seconds_per_gb
    return (
        row.name,
        _amount(row.value, row.unit),
        "" if row.ceiling is None else _amount(row.ceiling, row.unit),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if cpu is None else f"{cpu:.2f}",
    )


def _amount(value: float, unit: str) -> str:
    if unit == "B/s":
        return f"{value / 1e9:.2f} GB/s"
    if unit != "s":
        return f"{value:.3g} {unit}".rstrip()
    for factor, name in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.2f} {name}"
    return f"{value * 1e6:.1f} us"


_LINE, _LEFT, _WIDTH, _RIGHT = 24, 190, 420, 240  # pixels


def picture(rows: Sequence[Row], title: str) -> str:
    """An SVG with a bar for each row that has a ceiling; the line is the ceiling."""
    bars = [(row, row.ratio) for row in rows if row.ratio is not None]
    scale = _WIDTH / max([1.0, *(ratio for _, ratio in bars)])
    top, height = 2 * _LINE, (len(bars) + 3) * _LINE
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}" '
        f'height="{height}" font-family="sans-serif" font-size="13">'
    )
    parts = [
        svg,
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="{_LINE}" font-weight="bold">{escape(title)}</text>',
    ]
    for at, (row, ratio) in enumerate(bars):
        y, width = top + at * _LINE, ratio * scale
        name, value, ceiling, share, _ = map(escape, _cells(row))
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{name}</text>',
            f'<rect x="{_LEFT}" y="{y + 3}" width="{width:.1f}" height="15" fill="#4878a8"/>',
            f'<text x="{_LEFT + _WIDTH + 12}" y="{y + 14}">{share}: {value} of {ceiling}</text>',
        ]
    x = f"{_LEFT + scale:.1f}"
    parts += [
        f'<line x1="{x}" x2="{x}" y1="{top}" y2="{height - _LINE}" stroke="#c03020"/>',
        f'<text x="{x}" y="{height - 8}" text-anchor="middle">ceiling</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
