"""The report's plots as inline SVG: no script, no font and nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 22, 66
SMALLEST = 1e-9
"""Where an error axis ends: smaller errors, zero among them, are drawn there."""


@dataclass(frozen=True)
class LogAxis:
    """Powers of ten from bottom to top of the plot."""

    low: int
    high: int

    @classmethod
    def around(cls, values: Iterable[float]) -> LogAxis:
        """Whole powers of ten that hold every value."""
        logs = [math.log10(max(v, SMALLEST)) for v in values if math.isfinite(v)] or [0.0]
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low, max(high, low + 1))

    def y(self, value: float) -> float:
        """The height of `value`; what is not finite stands at the top."""
        log = math.log10(max(value, SMALLEST)) if math.isfinite(value) else self.high
        share = (min(log, self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def drawn(self) -> str:
        """Lines and labels."""
        step = max(1, (self.high - self.low) // 6)
        return "".join(
            _line(LEFT, self.y(10.0**power), WIDTH - RIGHT, self.y(10.0**power), "grid")
            + _text(LEFT - 8, self.y(10.0**power) + 4, f"1e{power}", "tick end")
            for power in range(self.low, self.high + 1, step)
        )


def error_by_tensor(errors: dict[str, dict[str, float]], noise: str | None, bound: float) -> str:
    """Worst error of every tensor, a mark per check; `errors[check][tensor]`, the check `noise` drawn apart."""
    tensors = list(dict.fromkeys(t for check in errors.values() for t in check))
    tensors = sorted(tensors, key=lambda t: t == "logits")  # the logits come last, as they do in the model
    axis = LogAxis.around([bound, *(v for check in errors.values() for v in check.values() if v > 0)])
    step = (WIDTH - LEFT - RIGHT) / max(1, len(tensors))
    parts = [axis.drawn(), _bound(axis, bound)]
    for index, tensor in enumerate(tensors):
        x = LEFT + (index + 0.5) * step
        seen = {c: e[tensor] for c, e in errors.items() if tensor in e and c != noise and e[tensor] > 0}
        if seen:
            parts.append(_line(x, axis.y(min(seen.values())), x, axis.y(max(seen.values())), "range"))
        for check, value in seen.items():
            style = "mark" if value <= bound else "mark wrong"
            parts.append(_circle(x, axis.y(value), 3.2, style, f"{tensor}, {check}: {value:.2e}"))
        if noise is not None and errors.get(noise, {}).get(tensor):
            value = errors[noise][tensor]
            parts.append(_circle(x + min(9, step / 3), axis.y(value), 3.2, "noise", f"{tensor}, {noise}: {value:.2e}"))
        name = tensor.replace("recurrent_state", "recurrent").replace("conv_state", "conv").replace(".", " ")
        parts.append(_text(x + 3, HEIGHT - BOTTOM + 12, name, "tick", -40 if len(tensors) < 30 else -70))
    return _svg("error-by-tensor", "".join(parts), "Worst error of each tensor over its largest magnitude")


def drift(candidate: Sequence[float], noise: Sequence[float], bound: float) -> str:
    """Error of each generated token's logits, one step after the other."""
    axis = LogAxis.around([bound, *(v for v in (*candidate, *noise) if v > 0)])
    parts = [axis.drawn(), _bound(axis, bound)]
    width = (WIDTH - LEFT - RIGHT) / max(1, len(candidate) - 1)
    for values, style in ((noise, "noise-line"), (candidate, "line")):
        if values:
            points = " ".join(f"{LEFT + i * width:.1f},{axis.y(v):.1f}" for i, v in enumerate(values))
            parts.append(f'<polyline class="{style}" points="{points}"/>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = round(share * max(0, len(candidate) - 1))
        parts.append(_text(LEFT + at * width, HEIGHT - BOTTOM + 18, str(at + 1), "tick middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 42, "generated token", "label middle"))
    return _svg("drift", "".join(parts), "Largest logit error of each generated token over the peak")


def scatter(pairs: Sequence[Sequence[float]]) -> str:
    """Logits of the candidate over those of the reference; on the line they are equal."""
    size, margin = 380, 54
    values = [v for pair in pairs for v in pair if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)

    def place(value: float) -> float:
        return margin + (value - low) / (high - low) * (size - margin - 14)

    parts = [_line(place(low), size - place(low), place(high), size - place(high), "bound")]
    for step in range(5):
        value = low + (high - low) * step / 4
        parts.append(_line(place(value), size - margin, place(value), 14, "grid"))
        parts.append(_line(margin, size - place(value), size - 14, size - place(value), "grid"))
        parts.append(_text(place(value), size - margin + 18, f"{value:.1f}", "tick middle"))
        parts.append(_text(margin - 8, size - place(value) + 4, f"{value:.1f}", "tick end"))
    for expected, actual in pairs:
        if math.isfinite(expected) and math.isfinite(actual):
            title = f"PyTorch {expected:.4f}, export {actual:.4f}"
            parts.append(_circle(place(expected), size - place(actual), 2.6, "mark", title))
    parts.append(_text(size / 2, size - 8, "PyTorch", "label middle"))
    parts.append(_text(14, size / 2, "export", "label middle", -90))
    return _svg("scatter", "".join(parts), "Logits of the export over those of PyTorch", size, size)


def _bound(axis: LogAxis, bound: float) -> str:
    y = axis.y(bound)
    return _line(LEFT, y, WIDTH - RIGHT, y, "bound") + _text(WIDTH - RIGHT - 4, y - 5, f"bound {bound:g}", "tick end")


def _svg(name: str, content: str, title: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg id="{name}" role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}" '
        f'style="max-width:{width}px">{content}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _circle(x: float, y: float, radius: float, style: str, title: str) -> str:
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, text: str, style: str, turn: int = 0) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    # a label under the axis that is turned ends at its mark
    anchor = " end" if turn and "middle" not in style else ""
    return f'<text class="{style}{anchor}" x="{x:.1f}" y="{y:.1f}"{turned}>{escape(text)}</text>'
