"""The activation as a layer holds it: fc1's output and the router weights in, fc2's input out.

Shape legend: T: tokens (any leading dimensions), F: width of the FFN, H: width of fc1's output (2F gated, F else).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ling.activations.ops import has_kernel
from ling.activations.reference import WholeRows, phi
from ling.activations.table import ResolvedActivation


class FFNActivation(torch.nn.Module):
    """phi of a resolved activation, times the router weight, keeping for the backward pass only what it was given.

    Where the activation has scalars, they are the 1-D tensor `scalars`: a parameter with its initial values, or with
    `learn: fixed` an fp32 buffer that no checkpoint holds. With `learn: global` the model gives all layers one
    parameter by `use_scalars`.

    Args:
        resolved: what the config says.
        implementation: `fused`: the compiled operator, `reference`: the registry's math, by autograd; see
            `ling.platform.select`. An activation without a compiled operator always has its reference.

    Attributes:
        name: the activation's name in the registry.
        gated: whether the input is gate ‖ up (2F wide) or one projection (F wide).
        learn: see `ling.activations.table.LEARN`.
        rows: row statistics, for row-wise activations; where F is a shard, to be replaced (see WholeRows).
    """

    scalars: Tensor | None

    def __init__(self, resolved: ResolvedActivation, implementation: str = "reference") -> None:
        super().__init__()
        self.name = resolved.activation.name
        self.gated = resolved.activation.gated
        self.learn = resolved.learn
        self.rows: Any = WholeRows()
        self._resolved = resolved
        self._layer = None if resolved.varies_by_layer else 0
        self._apply_activation = _implementation(implementation if has_kernel(self.name) else "reference")
        initial = resolved.initial_scalars()
        scalars = torch.tensor(initial, dtype=torch.float32) if initial else None
        if self.learn == "fixed":
            self.register_buffer("scalars", scalars, persistent=False)
        else:
            self.register_parameter("scalars", None if scalars is None else torch.nn.Parameter(scalars))

    @property
    def learns(self) -> bool:
        """Whether training changes the scalars."""
        return self.scalars is not None and self.learn != "fixed"

    def use_scalars(self, scalars: torch.nn.Parameter) -> None:
        """Take a parameter that another module owns for the scalars, in place of the own one."""
        self._parameters.pop("scalars", None)
        self.__dict__["scalars"] = scalars

    def set_layer(self, layer_index: int) -> None:
        """Use the parameters of this 0-based layer; needed where they differ by layer."""
        self._layer = layer_index

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
        if weight is not None and weight.shape != x.shape[:-1]:
            raise ValueError(f"router weight of shape {list(weight.shape)} for tokens of shape {list(x.shape[:-1])}")
        return self._apply_activation(x, weight, self.scalars, self._call())

    def extra_repr(self) -> str:
        """Name, parameters and learnable scalars, for `print(model)`."""
        resolved = self._resolved
        params = resolved.params if self._layer is None else resolved.for_layer(self._layer)
        parts = [self.name, *(f"{name}={value}" for name, value in params.items())]
        if resolved.initial:
            parts += [*(f"{name}={value}" for name, value in resolved.initial.items()), f"learn={self.learn}"]
        return ", ".join(parts)

    def _call(self) -> _Call:
        if self._layer is None:
            raise RuntimeError(f"{self.name}: its parameters differ by layer; call set_layer first")
        return _Call(self._resolved, self._layer, self.rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FFNActivation:
        super()._apply(fn, recurse)
        if self.learn == "fixed" and self.scalars is not None and self.scalars.dtype != torch.float32:
            # a cast of the model's weights is not meant to round what the config says
            values = self._resolved.initial_scalars()
            self.scalars = torch.tensor(values, dtype=torch.float32, device=self.scalars.device)
        return self


@dataclass(frozen=True)
class _Call:
    """What an application needs besides tensors."""

    resolved: ResolvedActivation
    layer: int
    rows: Any


def _implementation(name: str) -> Callable[[Tensor, Tensor | None, Tensor | None, _Call], Tensor]:
    """The function that computes an activation, of x, router weight, scalars and the rest."""
    if name == "reference":
        return _Recompute.apply
    if name == "fused":
        return _fused
    raise ValueError(f"no implementation of the activation is called {name!r}; there are: fused, reference")


def _fused(x: Tensor, weight: Tensor | None, scalars: Tensor | None, call: _Call) -> Tensor:
    from ling.activations import ops

    name, params, rows = call.resolved.activation.name, call.resolved.kernel_params(call.layer), call.rows
    if name == "polynorm":
        assert scalars is not None
        return ops.polynorm(x, weight, scalars, params[0], width=x.shape[-1] * rows.size, reduce=rows.sum)
    if name == "topk_relu":
        return ops.topk_relu(x, weight, int(params[0]), gather=rows.gather, shard=rows.rank)
    return ops.ffn_activation(x, weight, scalars, name, params)


def _weighted(tensors: Sequence[Any], call: _Call) -> Tensor:
    """phi times the router weight; `tensors` are x, router weight and scalars, in one dtype."""
    x_TH, weight_T, scalars = tensors
    resolved = call.resolved
    y_TF = phi(resolved.activation, x_TH, resolved.for_layer(call.layer), scalars, call.rows)
    return y_TF if weight_T is None else y_TF * weight_T.unsqueeze(-1)


class _Recompute(torch.autograd.Function):
    """Saves its input and the router weight only, and computes everything else again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_T: Tensor | None, scalars: Tensor | None, call: _Call) -> Tensor:
        ctx.save_for_backward(x_TH, weight_T, scalars)
        ctx.call = call
        given: tuple[Any, ...] = (x_TH, weight_T, scalars)
        wide = [None if tensor is None else tensor.to(_wide_dtype(x_TH)) for tensor in given]
        return _weighted(wide, call).to(x_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        wide_dtype = _wide_dtype(saved[0])
        # gradients cost reductions: only where they are wanted
        wanted = [needed and tensor is not None for needed, tensor in zip(ctx.needs_input_grad, saved, strict=False)]
        wide: list[Any] = [
            None if tensor is None else tensor.detach().to(wide_dtype).requires_grad_(needed)
            for needed, tensor in zip(wanted, saved, strict=True)
        ]
        with torch.enable_grad():
            y_TF = _weighted(wide, ctx.call)
        inputs = [tensor for needed, tensor in zip(wanted, wide, strict=True) if needed]
        found = iter(torch.autograd.grad(y_TF, inputs, grads[0].to(wide_dtype)))
        return (
            *(next(found).to(tensor.dtype) if needed else None for needed, tensor in zip(wanted, saved, strict=True)),
            None,
        )


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
