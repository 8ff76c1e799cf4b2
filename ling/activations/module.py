"""The activation as a layer holds it: fc1's output and the router weights in, fc2's input out.

Shape legend: T: tokens (any leading dimensions), F: width of the FFN, H: width of fc1's output (2F gated, F else).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ling.activations.reference import REFERENCE
from ling.activations.table import ResolvedActivation


class FFNActivation(torch.nn.Module):
    """phi of a resolved activation, times the router weight, keeping for the backward pass only what it was given.

    Attributes:
        name: the activation's name in the registry.
        gated: whether the input is gate ‖ up (2F wide) or one projection (F wide).
    """

    def __init__(self, resolved: ResolvedActivation) -> None:
        super().__init__()
        self.name = resolved.activation.name
        self.gated = resolved.activation.gated
        self._resolved = resolved
        self._params = None if resolved.varies_by_layer else resolved.for_layer(0)

    def set_layer(self, layer_index: int) -> None:
        """Use the parameters of this 0-based layer; needed where they differ by layer."""
        self._params = self._resolved.for_layer(layer_index)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Apply the activation.

        Args:
            x: `[..., 2F]` (gate ‖ up along the last dimension) if gated, else `[..., F]`.
            weight: `[...]`, the router weight of each token; multiplied in fp32, before the result is rounded.

        Returns:
            `[..., F]` in x's dtype.

        Raises:
            ValueError: weight does not have one number per token.
            RuntimeError: the parameters differ by layer and `set_layer` was not called.
        """
        if self._params is None:
            raise RuntimeError(f"{self.name}: its parameters differ by layer; call set_layer first")
        if weight is not None and weight.shape != x.shape[:-1]:
            raise ValueError(f"router weight of shape {list(weight.shape)} for tokens of shape {list(x.shape[:-1])}")
        return _Recompute.apply(x, weight, self.name, self.gated, self._params)

    def extra_repr(self) -> str:
        """Name and parameters, for `print(model)`."""
        params = self._resolved.params if self._params is None else self._params
        return ", ".join([self.name, *(f"{name}={value}" for name, value in params.items())])


def _weighted(x_TH: Tensor, weight_T: Tensor | None, name: str, gated: bool, params: dict[str, float]) -> Tensor:
    halves = x_TH.chunk(2, dim=-1) if gated else (x_TH,)
    y_TF = REFERENCE[name](*halves, **params)
    return y_TF if weight_T is None else y_TF * weight_T.unsqueeze(-1)


class _Recompute(torch.autograd.Function):
    """Saves its input and the router weight only, and computes everything else again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_T: Tensor | None, name: str, gated: bool, params: dict[str, float]
    ) -> Tensor:
        ctx.save_for_backward(x_TH, weight_T)
        ctx.arguments = (name, gated, params)
        wide = _wide_dtype(x_TH)
        wide_weight_T = None if weight_T is None else weight_T.to(wide)
        return _weighted(x_TH.to(wide), wide_weight_T, *ctx.arguments).to(x_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_TH, weight_T = ctx.saved_tensors
        wide = _wide_dtype(x_TH)
        with torch.enable_grad():
            wide_x_TH = x_TH.detach().to(wide).requires_grad_()
            wide_weight_T = None if weight_T is None else weight_T.detach().to(wide).requires_grad_()
            y_TF = _weighted(wide_x_TH, wide_weight_T, *ctx.arguments)
        # the gradient of the router weight costs a reduction over F: not where nobody wants it
        inputs: list[Any] = [wide_x_TH, wide_weight_T] if ctx.needs_input_grad[1] else [wide_x_TH]
        dx_TH, *dweight_T = torch.autograd.grad(y_TF, inputs, grads[0].to(wide))
        return dx_TH.to(x_TH.dtype), dweight_T[0].to(weight_T.dtype) if dweight_T else None, None, None, None


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
