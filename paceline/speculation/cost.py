"""What a forward pass costs by its rows: a curve measured at start-up, corrected by the steps that follow.

The curve is not convex: kernels work in tiles, so that six rows may cost what one costs and the seventh as much
again. It is therefore kept as points, and only its correction is fitted:

    seconds = scale * curve(rows) + slope * curve(1) * drawn

`scale` is what load, clock and context do to everything; `slope` what a drawn row costs beyond its products, such
as sampling it. Both come from recursive least squares with forgetting, on relative errors, with a prior at (1, 0).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

MEMORY = 0.98
"""What a step's weight becomes with each step after it: some fifty steps count."""
SCALE_PRECISION = 0.04
SLOPE_PRECISION = 4.0
"""The prior's weights, in steps: noise of 0.1 against a scale known to 0.5 and a slope known to 0.05."""
SURPRISE = 1.6
"""A step that takes more than this times what was expected, or less than the inverse, counts as just that: one
preempted step in a hundred must not move the fit."""


class VerifyCost:
    """Seconds of a forward pass. `points` has them by rows; `window_s` is what each window beyond the first adds."""

    def __init__(self, points: Mapping[int, float], window_s: float = 0.0) -> None:
        self._points = dict(points)
        if not points or min(points) < 1 or min(points.values()) <= 0:
            raise ValueError(f"points: positive seconds by positive rows are needed, got {dict(points)}")
        self._rows = sorted(points)
        # More rows are never cheaper; a measurement that says so was disturbed.
        self._seconds = [max(points[r] for r in self._rows if r <= rows) for rows in self._rows]
        self._window_s = max(0.0, window_s)
        self._known: list[float] = []
        self._unit = self.curve(1)
        # Normal equations of y = scale + slope * u, with their prior.
        self._uu = self._u1 = self._11 = self._uy = self._1y = 0.0
        self.scale, self.slope = 1.0, 0.0

    def curve(self, rows: int, windows: int = 1) -> float:
        """Seconds as measured at start-up, interpolated; beyond the last point along the last stretch."""
        known = self._known
        while len(known) <= rows:
            known.append(self._interpolated(len(known)))
        return known[rows] + self._window_s * (windows - 1)

    def fresh(self) -> VerifyCost:
        """The curve as it was measured, without what steps have taught since."""
        return VerifyCost(self._points, self._window_s)

    def seconds(self, drawn: int, windows: int = 1, prefill: int = 0) -> float:
        """Of a step with `drawn` rows of decode and verification windows beside `prefill` prompt tokens."""
        curve = self.curve(drawn + prefill, windows)
        return max(0.25 * self.scale * curve, self.scale * curve + self.slope * self._unit * drawn)

    def windows_within(self, seconds: float, most: int) -> int:
        """How many sequences decode in a step of so many seconds, a token each; between 1 and `most`."""
        return max(1, next((n - 1 for n in range(1, most + 1) if self.seconds(n, n) > seconds), most))

    def upwards(self, windows: int, count: int, prefill: int = 0) -> list[float]:
        """Seconds of a step with as many drawn rows as windows, with one more, … with `count` more."""
        self.curve(windows + count + prefill)  # so that all of them are known
        curve = self._known[windows + prefill : windows + count + prefill + 1]
        scale, slope, extra = self.scale, self.slope * self._unit, self._window_s * (windows - 1)
        return [
            max(0.25 * scale * (seconds + extra), scale * (seconds + extra) + slope * drawn)
            for drawn, seconds in enumerate(curve, start=windows)
        ]

    def observe(self, drawn: int, windows: int, prefill: int, seconds: float) -> None:
        """A step took this long."""
        expected = self.seconds(drawn, windows, prefill)
        seconds = min(max(seconds, expected / SURPRISE), expected * SURPRISE)
        curve = self.curve(drawn + prefill, windows)
        y, u = seconds / curve, drawn * self._unit / curve
        self._uu = MEMORY * self._uu + u * u
        self._u1 = MEMORY * self._u1 + u
        self._11 = MEMORY * self._11 + 1.0
        self._uy = MEMORY * self._uy + u * y
        self._1y = MEMORY * self._1y + y
        self._solve()

    def _interpolated(self, rows: int) -> float:
        xs, ys = self._rows, self._seconds
        if len(xs) == 1:
            return ys[0] * max(1.0, rows / xs[0])
        if rows <= xs[0]:
            return ys[0]
        at = min(bisect_left(xs, rows), len(xs) - 1)
        x0, x1, y0, y1 = xs[at - 1], xs[at], ys[at - 1], ys[at]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    def _solve(self) -> None:
        a, b, d = self._11 + SCALE_PRECISION, self._u1, self._uu + SLOPE_PRECISION
        e, f = self._1y + SCALE_PRECISION, self._uy
        det = a * d - b * b
        self.scale = max((e * d - b * f) / det, 0.05)
        self.slope = (a * f - b * e) / det
