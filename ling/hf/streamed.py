"""Models that never are in memory as a whole: a module's weights are read when it runs and dropped afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Modules built inside have no weights, only shapes; tables that follow from the configuration are there.

    Those are the buffers that no file holds, such as the frequencies of a rotary embedding.
    """
    parameter, buffer = torch.nn.Module.register_parameter, torch.nn.Module.register_buffer

    def register_parameter(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None:
            param = torch.nn.Parameter(param.detach().to("meta"), requires_grad=False)
        parameter(module, name, param)

    def register_buffer(
        module: torch.nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True
    ) -> None:
        buffer(module, name, tensor.to("meta") if tensor is not None and persistent else tensor, persistent)

    with (
        patch.object(torch.nn.Module, "register_parameter", register_parameter),
        patch.object(torch.nn.Module, "register_buffer", register_buffer),
    ):
        yield


def stream_weights(model: torch.nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Let every module of a model fetch those of its parameters and buffers that are on the meta device for each call.

    Args:
        model: each of its tensors is used only in the forward pass of the module that owns it.
        read: gives the tensor of a (qualified) name.
    """
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        absent = {name: tensor for name, tensor in own if tensor.is_meta}
        if absent:
            loader = _Loader(f"{prefix}." if prefix else "", absent, read)
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
