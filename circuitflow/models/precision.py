"""Keeping a float64 model in float64 where its code casts to float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _KeepDouble(TorchFunctionMode):
    """Makes ``x.float()`` and ``x.to(torch.float32)`` leave float64 tensors as they are."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        casts = func is torch.Tensor.float or (func is torch.Tensor.to and args[1:] == (torch.float32,))
        if casts and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def keep_double(model: nn.Module) -> None:
    """Let the norms of a float64 model work in float64.

    RMS norms in transformers compute in float32 whatever the model's precision: right for half precision, but it
    would limit exact tests (finite differences, conservation) to seven digits. Layer norms need nothing.
    """
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = _in_double(module.forward)


def _in_double(forward: Callable[..., Any]) -> Callable[..., Any]:
    def exact(*args: Any, **kwargs: Any) -> Any:
        with _KeepDouble():
            return forward(*args, **kwargs)

    return exact
