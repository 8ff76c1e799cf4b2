"""Models that never are in memory as a whole: a module's weights are read when it runs and dropped afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def stream_weights(model: torch.nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Let every module of a model built on the meta device fetch its own parameters and buffers for each call.

    Args:
        model: each of its tensors is used only in the forward pass of the module that owns it.
        read: gives the tensor of a (qualified) name.
    """
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if any(tensor.is_meta for _, tensor in own):
            loader = _Loader(f"{prefix}.", dict(own), read)
            module.register_forward_pre_hook(loader.fetch)
            module.register_forward_hook(loader.drop, always_call=True)


class _Loader:
    def __init__(self, prefix: str, placeholders: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
        self._prefix, self._placeholders, self._read = prefix, placeholders, read

    def fetch(self, module: Any, args: Any) -> None:
        for name, placeholder in self._placeholders.items():
            if name in module._non_persistent_buffers_set:
                tensor = torch.zeros_like(placeholder, device="cpu")
            else:
                tensor = self._read(self._prefix + name).to(placeholder.dtype)
            self._set(module, name, tensor)

    def drop(self, module: Any, args: Any, output: Any) -> None:
        for name, placeholder in self._placeholders.items():
            self._set(module, name, placeholder)

    def _set(self, module: Any, name: str, tensor: torch.Tensor) -> None:
        if name in module._parameters:
            if not isinstance(tensor, torch.nn.Parameter):
                tensor = torch.nn.Parameter(tensor, requires_grad=False)
            module._parameters[name] = tensor
        else:
            module._buffers[name] = tensor
