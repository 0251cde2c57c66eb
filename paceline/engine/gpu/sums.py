"""What ranks on GPUs do together within a step of fused layers: sum rows, look up tokens, put logits side by side."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from paceline.engine.gpu import peer_kernels
from paceline.engine.gpu.linear import Exchange, Linears, Weight
from paceline.engine.gpu.peers import PeerGroup
from paceline.engine.tp.group import Gathering, Group

PEER_ROWS = 64
"""Rows up to which ranks write to each other. Beyond, what is summed is megabytes, for which NCCL is made."""
PEER_COLUMNS = 256
"""Likewise of logits."""
SLOTS = 4
"""Places for what is summed, by turns; two would do."""
PROGRAMS = 1024
"""Of an exchange, at most."""


class Sums:
    """By the group's own calls. `vocabulary` are the rows of the embedding, and outputs of the head, of each rank."""

    def __init__(self, group: Group, vocabulary: list[int]) -> None:
        self.group, self.vocabulary = group, vocabulary
        self._first = sum(vocabulary[: group.rank])
        self._last = self._first + vocabulary[group.rank]

    def begin(self) -> None:
        """Before anything else of a step."""

    def added(self, linears: Linears, x: torch.Tensor, y: torch.Tensor, weight: Weight, scale: float) -> torch.Tensor:
        """x + scale (sum over ranks of y W^T + b), in place of `x`."""
        return x.add_(self.group.all_reduce(linears.product(y, weight)), alpha=scale)

    def embedded(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """[tokens, width] of the whole embedding, of which `table` is this rank's part."""
        return self.group.all_reduce(self._looked_up(ids, table))

    def logits(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Put all ranks' [rows, own vocabulary] side by side in `out`, float32 [rows, vocabulary], on every rank."""
        out.copy_(self.group.all_gather(part, self.vocabulary))

    def place(self, rows: int) -> torch.Tensor | None:  # noqa: ARG002  (any will do)
        """Where logits of so many rows need not be copied to, float32 [rows, vocabulary]; None: anywhere."""
        return None

    def _looked_up(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if not table.is_cuda:
            held = (ids >= self._first) & (ids < self._last)
            return F.embedding((ids - self._first).clamp(0, len(table) - 1), table) * held[:, None]
        out = torch.empty((len(ids), table.shape[1]), dtype=table.dtype, device=table.device)
        block = 1024
        peer_kernels.take_rows[(len(ids), -(-table.shape[1] // block))](
            ids, table, out, self._first, self._last, table.shape[1], BLOCK=block
        )
        return out


class PeerSums(Sums):
    """By kernels that write into the other GPUs' memory where there are few rows.

    `exchanges` is how many sums a step may have; `width` is that of a row.
    """

    def __init__(
        self, group: PeerGroup, vocabulary: list[int], *, exchanges: int, width: int, dtype: torch.dtype, overlaps: bool
    ) -> None:
        super().__init__(group, vocabulary)
        size = group.size
        self._peers, self._overlaps = group, overlaps
        self._slot = PEER_ROWS * width
        _, self._slots = group.shared(SLOTS * size * self._slot, dtype)
        _, self._flags = group.shared((exchanges + 1) * PROGRAMS * size, torch.int32)
        self._table, self._tables = group.shared(PEER_COLUMNS * sum(vocabulary), torch.float32)
        self._step = torch.zeros(1, dtype=torch.int32, device=group.device)
        self._done = torch.zeros(1, dtype=torch.int32, device=group.device)
        self._last_exchange = exchanges
        self._exchange = 0

    def begin(self) -> None:
        self._exchange = 0
        peer_kernels.begin_step[(1,)](self._step, num_warps=1)

    def added(self, linears: Linears, x: torch.Tensor, y: torch.Tensor, weight: Weight, scale: float) -> torch.Tensor:
        if len(y) > PEER_ROWS:
            return super().added(linears, x, y, weight, scale)
        exchange = self._next(scale)
        found = linears.added_of_all(x, y, weight, exchange)
        return self._sum(x, linears.product(y, weight), exchange, added=True) if found is None else found

    def embedded(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        found = self._looked_up(ids, table)
        return (
            self.group.all_reduce(found)
            if len(ids) > PEER_ROWS
            else self._sum(found, found, self._next(1.0), added=False)
        )

    def logits(self, part: torch.Tensor, out: torch.Tensor) -> None:
        rows, width = part.shape
        vocabulary = out.shape[1]
        if rows > PEER_COLUMNS:
            return super().logits(part, out)
        block, place = 4096, self._place(self._last_exchange)
        peer_kernels.share_columns[(-(-width // block), rows)](
            part, self._tables, self._flags, self._done, self._step, place, width, self._first, vocabulary,
            RANK=self.group.rank, SIZE=self.group.size, BLOCK=block, num_warps=8,
        )  # fmt: skip
        peer_kernels.await_peers[(1,)](
            self._flags, self._step, place, self._peers.timeout_ns, RANK=self.group.rank, SIZE=self.group.size,
            num_warps=1,
        )  # fmt: skip
        table = self._table[: rows * vocabulary].view(rows, vocabulary)
        if table.data_ptr() != out.data_ptr():
            out.copy_(table)
        return None

    def place(self, rows: int) -> torch.Tensor | None:
        return self._table[: rows * sum(self.vocabulary)].view(rows, -1) if rows <= PEER_COLUMNS else None

    def _next(self, factor: float) -> Exchange:
        number, self._exchange = self._exchange, self._exchange + 1
        assert number < self._last_exchange, "a step has more sums than there are flags for"
        return Exchange(
            self._slots,
            self._flags,
            self._step,
            number % SLOTS,
            self._place(number),
            self._peers.timeout_ns,
            self.group.rank,
            self.group.size,
            self._slot,
            factor,
        )

    def _place(self, number: int) -> int:
        return number * PROGRAMS * self.group.size

    def _sum(self, x: torch.Tensor, y: torch.Tensor, of: Exchange, *, added: bool) -> torch.Tensor:
        block, warps = (1024, 4) if y.numel() <= 1 << 13 else (4096, 8)
        peer_kernels.sum_peers[(-(-y.numel() // block),)](
            x, y, of.factor, of.slots, of.flags, of.step, of.slot, of.place, y.numel(), of.limit,
            RANK=of.rank, SIZE=of.size, SLOT=of.slot_size, ADDED=added, BLOCK=block,
            OVERLAPS=self._overlaps, launch_pdl=self._overlaps, num_warps=warps,
        )  # fmt: skip
        return x


def sums_for(group: Group, outputs: int, layers: int, embedding: torch.Tensor, *, overlaps: bool) -> Sums:
    """For so many layers over rows as `embedding` has them; this rank's head has so many `outputs`. All ranks call this
    at once."""
    device, width, dtype = embedding.device, embedding.shape[1], embedding.dtype
    counts = torch.zeros(group.size, device=device)
    counts[group.rank] = outputs
    vocabulary = [int(count) for count in group.all_reduce(counts).tolist()]
    group = group.met() if isinstance(group, Gathering) else group
    if not isinstance(group, PeerGroup):
        return Sums(group, vocabulary)
    return PeerSums(group, vocabulary, exchanges=2 * layers + 1, width=width, dtype=dtype, overlaps=overlaps)
