"""AdamW with the state layout of Apex's and Transformer Engine's FusedAdam.

megatron-core saves, loads and reshards optimizer state in that layout without gaps; torch's own AdamW keeps a `step`
tensor per parameter, which megatron-core drops on the way. So a machine without either package uses this class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), run by torch's fused kernel.

    State: `step` (int) in the parameter group; `exp_avg` and `exp_avg_sq` (fp32) per parameter. All parameters are
    fp32 (master weights) with fp32 gradients; those without a gradient are left as they are, and an empty group counts
    its steps all the same, so that groups agree on every rank.

    Args:
        params: parameters or groups of them.
        lr: learning rate, until a schedule writes another one into the groups.
        betas: decay of the first and of the second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        adam_w_mode, bias_correction, capturable: of FusedAdam's signature; only these values are implemented.

    Raises:
        ValueError: another value of the last three arguments; in `step`, a parameter or gradient that is not fp32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode or not bias_correction or capturable:
            raise ValueError("AdamW: only adam_w_mode=True, bias_correction=True, capturable=False are implemented")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # FusedAdam writes the key at its first step only
            group.setdefault("step", 0)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            with_grad = [param for param in group["params"] if param.grad is not None]
            for device in dict.fromkeys(param.device for param in with_grad):
                self._update([param for param in with_grad if param.device == device], group, device)
        return loss

    def _update(self, params: list[torch.Tensor], group: dict[str, Any], device: torch.device) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        if any(tensor.dtype != torch.float32 for tensor in params + grads):
            raise ValueError("AdamW: parameters and gradients must be fp32")
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        # one tensor for all: the kernel only reads it
        step = torch.full((), float(group["step"]), dtype=torch.float32, device=device)
        torch._fused_adamw_(
            params,
            grads,
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
