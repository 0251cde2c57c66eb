"""Which streaming window a request gets: its own, the server's or none. Asked at the edge, and by the engine again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paceline.errors import InvalidRequest
from paceline.sessions.window import DEFAULT_N_KEEP, HALF
from paceline.types import MAX_TOKENS, SamplingParams


@dataclass(frozen=True, slots=True)
class WindowRules:
    """What holds for requests that do not say otherwise, and what they may ask for.

    `largest` is the longest text the model's positions, and the KV cache, are good for. `refusal` says why there can
    be no window with this model.
    """

    largest: int
    ctx_size: int | None = None
    n_keep: int = DEFAULT_N_KEEP
    n_discard: int = HALF
    refusal: str | None = None

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """The parameters with their window, if there is one, filled in. Raises InvalidRequest."""
        ctx_size = self.ctx_size if params.ctx_size is None else params.ctx_size
        if not ctx_size:
            for name in ("n_keep", "n_discard"):
                if getattr(params, name) is not None:
                    raise InvalidRequest(f"{name}: has no effect without ctx_size", param=name)
            return params
        if self.refusal is not None:
            raise InvalidRequest(f"ctx_size: no streaming window with this model: {self.refusal}", param="ctx_size")
        if ctx_size > self.largest:
            raise InvalidRequest(
                f"ctx_size: {ctx_size} is beyond the model's context of {self.largest}", param="ctx_size"
            )
        n_keep = self.n_keep if params.n_keep is None else params.n_keep
        n_discard = self.n_discard if params.n_discard is None else params.n_discard
        return replace(params, ctx_size=ctx_size, n_keep=n_keep, n_discard=n_discard)

    def longest(self, params: SamplingParams) -> int:
        """Prompt and output a request with these (resolved) parameters may have."""
        return MAX_TOKENS if params.ctx_size else self.largest
