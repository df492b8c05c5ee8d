"""Swap torch.nn's recurrent modules in a model for ours, and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from torch_manual.modules.lstm import LSTM, LSTMCell

M = TypeVar("M", bound=nn.Module)

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
STOCK = {ours: stock for stock, ours in OURS.items()}


def replace(model: M, *, subclasses: bool = False) -> M:
    """Make every `nn.LSTM` and `nn.LSTMCell` in `model`, itself included, one of ours; return it.

    The modules stay the very objects they are and change their class. So everything that refers to
    them or to their parameters goes on as before: optimizers, hooks, `training` and `requires_grad`
    flags, parametrizations, shared modules, compiled references.

    Args:
        model: any module.
        subclasses: also swap instances of subclasses of the stock modules; what the subclass
            overrides is then out of use until `restore`. By default they are left alone.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: an LSTM in it is sharded already; `fully_shard` comes after `replace`.
    """
    for module in _modules(model, "replace", (*OURS,)):
        cls = _unparametrized(module)
        stock = next((s for s in OURS if cls is s or (subclasses and issubclass(cls, s))), None)
        if stock is not None:
            if cls is not stock:
                module._stock_class = cls  # type: ignore[assignment]
            _become(module, OURS[stock])
    return model


def restore(model: M) -> M:
    """Undo `replace`: make every `LSTM` and `LSTMCell` of ours in `model` torch.nn's; return it.

    For tools that ask `isinstance(m, nn.LSTM)`: quantization, pruning, ONNX export. Modules that
    were built as ours are converted as well. `PeepholeLSTM` has no stock counterpart and stays.

    `recompute` is forgotten: torch.nn's LSTM knows none.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: an LSTM in it is sharded (`fully_shard`), or has `return_cells=True`, which
            torch.nn's can not do.
    """
    modules = [m for m in _modules(model, "restore", (*STOCK,)) if _unparametrized(m) in STOCK]
    if any(getattr(module, "return_cells", False) for module in modules):
        raise ValueError("restore: torch.nn.LSTM has no return_cells; set it to False first")
    for module in modules:
        stock = STOCK[_unparametrized(module)]
        for ours in ("return_cells", "recompute"):
            module.__dict__.pop(ours, None)
        _become(module, module.__dict__.pop("_stock_class", stock))
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return model


def _modules(model: nn.Module, caller: str, kinds: tuple[type, ...]) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    for module in modules:
        sharded = any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
        if sharded and isinstance(module, kinds):
            raise ValueError(f"{caller}: a {type(module).__name__} is sharded: {caller} it before")
    return modules


def _unparametrized(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one below it that `torch.nn.utils.parametrize` has put on top."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of `module`, keeping the properties of a parametrized one."""
    module.__dict__.pop("_flat_weights", None)
    if parametrize.is_parametrized(module):
        top = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), top)
    module.__class__ = cls
