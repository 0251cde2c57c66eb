"""Muon (Jordan et al. 2024): momentum whose matrix is made orthogonal, so that every direction learns equally fast.

With the scale of Liu et al. (2502.16982), an update has the root mean square AdamW's would have, and one learning
rate serves both: matrices inside the layers go through Muon, the embedding and the norms through AdamW. At the sizes
of drafts it needs about half of AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

RMS = 0.2
"""Of an update at learning rate 1; AdamW's typical one."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For matrices. Those of equal shape are orthogonalized together, which is what keeps a GPU busy."""

    def __init__(self, matrices: Iterable[torch.Tensor], *, lr: float, momentum: float = 0.95, decay: float = 0.0):
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                self._update(matrices, shape, group)

    def _update(self, matrices: list[torch.Tensor], shape: torch.Size, group: dict[str, float]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        gradients: list[torch.Tensor] = [matrix.grad for matrix in matrices]  # type: ignore[misc]
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        averages = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        # Nesterov: look ahead along the average that this gradient has just changed.
        ahead = torch.stack(torch._foreach_lerp(gradients, averages, momentum))
        update = orthogonal(ahead) * (RMS * max(shape) ** 0.5 * lr)
        if group["decay"]:
            torch._foreach_mul_(matrices, 1 - lr * group["decay"])
        torch._foreach_sub_(matrices, list(update.to(matrices[0].dtype).contiguous().unbind()))


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[n, rows, columns] with singular values near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    # CPUs without bfloat16 units emulate it, slowly.
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    found: torch.Tensor = x.mT if tall else x
    return found
