"""Parts of a model by what they are, and another forward for one of them: what rules for passes are made of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Every norm of a model (post-norms, those of queries and keys, the final one), in the order of its modules."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
    ]


def attention_of(block: nn.Module) -> nn.Module:
    """The module of a block that calls the attention function.

    :raises TypeError: the block has none under a name that this library knows.
    """
    for name in ("self_attn", "attn", "attention"):
        if hasattr(block, name):
            return block.get_submodule(name)
    raise TypeError(f"{type(block).__name__} has no attention module that this library knows")


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Another forward for one module; one that was set on the instance before comes back afterwards."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
