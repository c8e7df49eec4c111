"""A run's losses as a small picture (SVG), for the model card. No plotting library: a bare training machine has none."""

from __future__ import annotations

import math
from html import escape

from trainers.records import StepRecord

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 56, 16, 32, 40
SHOWN = 400
"""Points of the training curve at most: longer runs are averaged, so that the picture stays small."""


def loss_curve(steps: list[StepRecord]) -> str:
    """Training loss as a line, validation loss as dots, against the step. `steps` holds at least one record, in order."""
    training = _averaged([(float(s.step), s.train_loss) for s in steps if math.isfinite(s.train_loss)])
    validated = [(float(s.step), s.valid_loss) for s in steps if s.valid_loss is not None and math.isfinite(s.valid_loss)]
    losses = [y for _, y in training + validated] or [0.0]
    ticks = _ticks(min(losses), max(losses))
    low, high, last = min(ticks[0], *losses), max(ticks[-1], *losses), max(steps[-1].step, 2)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, said: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, 18, "loss, nats per supervised token", "start"),
    ]
    for tick in ticks:
        y = at(1, tick)[1]
        parts += [f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>', text(LEFT - 6, y + 4, f"{tick:g}", "end")]
    for step in dict.fromkeys((1, (1 + last) // 2, last)):
        parts.append(text(at(step, low)[0], HEIGHT - BOTTOM + 18, f"{step}"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "step"))
    line = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in training)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#4878a8" stroke-width="1.5"/>')
    parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="#c05820"/>'.format(*at(*point)) for point in validated]
    parts.append(f'<g transform="translate({WIDTH - RIGHT - 170} 14)"><path d="M0 0h18" stroke="#4878a8" stroke-width="2"/>')
    parts.append('<text x="24" y="4">training</text><circle cx="92" r="3.5" fill="#c05820"/><text x="102" y="4">validation</text></g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // SHOWN) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, four steps or so."""
    rough = max(high - low, 1e-3 * max(abs(high), 1e-6)) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * m for m in (1, 2, 5, 10) if scale * m >= rough)
    first = math.floor(low / step)
    return [round(i * step, 12) for i in range(first, max(first + 1, math.ceil(high / step)) + 1)]
