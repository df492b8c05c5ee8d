"""Jᵀ d and J u of the LSTM as nodes of the graph, each other's derivative (lstm_gradients.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_manual.functions._function import PositionalFunction, keep_signature, wanted_by_engine
from torch_manual.functions.lstm_gradients import (
    Primal,
    Tensors,
    lstm_gradient_tangents,
    lstm_gradients,
    lstm_tangents,
)


class LSTMGradientFunction(PositionalFunction):
    """Jᵀ d: (needs, dy, dh_n, dc_n, dcells, *primal) → (dx, dh0, dc0, dpre, dh, *dweights)."""

    @staticmethod
    @keep_signature
    def forward(needs: Sequence[bool], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return lstm_gradients(needs, tensors[:4], Primal.of(tensors[4:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor | None, ...]) -> None:
        ctx.needs, *tensors = inputs
        dpre, dh = output[3:5]
        ctx.mark_non_differentiable(dpre, dh)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dpre, dh, *tensors)
        ctx.save_for_forward(dpre, dh, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        dpre, dh, *tensors = ctx.saved_tensors
        outer, primal = tensors[:4], tensors[4:]
        u = [*cotangents[:3], *cotangents[5:]]
        wanted = ctx.needs_input_grad[1:]
        touter, gradients = _second(wanted[4:], outer, u, primal, dpre, dh)
        given = (t if d is not None else None for t, d in zip(touter, outer, strict=True))
        return None, *given, *gradients

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        dpre, dh, *tensors = ctx.saved_tensors
        outer, primal = tensors[:4], tensors[4:]
        touter, u = tangents[:4], [*tangents[4:7], *tangents[11:]]
        ty, _, _, tcells, tgates = LSTMTangentFunction.apply(*u, *primal)
        tdx, tdh0, tdc0, *tdweights = LSTMSecondFunction.apply(
            ctx.needs, dpre, dh, ty, tgates, tcells, *outer, *touter, *u, *primal
        )
        return tdx, tdh0, tdc0, None, None, *tdweights

    @staticmethod
    def vmap(info: Any, in_dims: tuple, needs: Sequence[bool], *tensors: Tensor | None) -> tuple:
        shared_weights = all(dim is None for dim in (in_dims[8], *in_dims[12:]))
        if not shared_weights or any(_is_tracked(t) for t in tensors if t is not None):
            return vmap_by_loop(LSTMGradientFunction, info, in_dims, needs, *tensors)
        n = info.batch_size
        folded = [
            t if t is None else t * n if k == 7 else fold(t, dim, 1 if k in (0, 4, 8) else 2, n)
            for k, (t, dim) in enumerate(zip(tensors[:11], in_dims[1:12], strict=True))
        ]
        p = Primal.of([*folded[4:], *tensors[11:]])
        dx, dh0, dc0, dpre, dh, *dweights = lstm_gradients(needs, folded[:4], p, n)
        rows = [
            t if t is None or t.dim() == 2 else t.unflatten(1, (-1, n))
            for t in (dh0, dc0, dpre, dh)
        ]
        outputs = (dx, *rows, *dweights)
        dims = (
            0,
            *(None if t is None or t.dim() == 2 else 2 for t in rows),
            *(0 for _ in dweights),
        )
        return outputs, tuple(None if t is None else d for t, d in zip(outputs, dims, strict=True))


class LSTMTangentFunction(PositionalFunction):
    """J u: (*u, *primal) → tangents of (y, h_n, c_n, cells, gates)."""

    @staticmethod
    @keep_signature
    def forward(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        u, primal = _halves(tensors)
        return lstm_tangents(u, Primal.of(primal))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[4])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        u, primal = _halves(ctx.saved_tensors)
        outer = cotangents[:4]
        wanted_u, wanted = _halves(ctx.needs_input_grad)
        needs = (*wanted[:3], *wanted[7:])
        everything = tuple(a or b for a, b in zip(wanted_u, needs, strict=True))
        gradients = LSTMGradientFunction.apply(everything, *outer, *primal)
        dpre, dh = gradients[3:5]
        du = (*gradients[:3], *gradients[5:])
        _, dprimal = _second(wanted, outer, u, primal, dpre, dh)
        given = (g if t is not None else None for g, t in zip(du, u, strict=True))
        return *given, *dprimal

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "lstm: forward mode over forward mode is not supported; take one of the two "
            "derivatives in reverse mode (torch.func.hessian, jacfwd(jacrev(f)), jacrev(jacfwd(f)))"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *tensors: Tensor | None) -> tuple:
        return vmap_by_loop(LSTMTangentFunction, info, in_dims, *tensors)


class LSTMSecondFunction(PositionalFunction):
    """R{Jᵀ d} along u: the Hessian of <d, outputs> times u, and Jᵀ times the tangent of d.

    Linear in both, and the Hessian is its own transpose: these derivatives are more of the same.
    The end of the line are those with respect to the inputs and d, which would be of third order.
    """

    @staticmethod
    @keep_signature
    def forward(needs: Sequence[bool], *tensors: Any) -> tuple[Tensor | None, ...]:
        dpre, dh, ty, tgates, tcells, *rest = tensors
        outer, touter, (u, primal) = _parts(rest)
        return lstm_gradient_tangents(
            needs, outer, touter, u, Primal.of(primal), ty, tgates, tcells, dpre, dh
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, dpre, dh, _, _, _, *rest = inputs
        outer, _, (_, primal) = _parts(rest)
        ctx.are_tensors = [isinstance(t, Tensor) for t in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dpre, dh, *outer, *primal)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = wanted_by_engine(ctx, ctx.are_tensors)
        outer_wanted, touter_wanted, (u_wanted, primal_wanted) = _parts(wanted[6:])
        if any(outer_wanted) or any(primal_wanted):
            raise RuntimeError("lstm: derivatives of third order are not supported")
        dpre, dh, *tensors = ctx.saved_tensors
        outer, primal = tensors[:4], tensors[4:]
        of_primal = *u_wanted[:3], *(False,) * 4, *u_wanted[3:]
        dtouter, dprimal = _second(of_primal, outer, cotangents, primal, dpre, dh)
        dtouter = [d if w else None for d, w in zip(dtouter, touter_wanted, strict=True)]
        du = *dprimal[:3], *dprimal[7:]
        # ty, tgates and tcells are of u, too: what goes through them is in du.
        return *(None,) * 10, *dtouter, *du, *(None,) * len(primal)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("lstm: derivatives of third order are not supported")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, needs: Sequence[bool], *tensors: Tensor | None) -> tuple:
        return vmap_by_loop(LSTMSecondFunction, info, in_dims, needs, *tensors)


def _second(
    wanted: Sequence[bool], outer: Tensors, u: Tensors, primal: Tensors, dpre: Tensor, dh: Tensor
) -> tuple[Tensors, Tensors]:
    """J u, and R{Jᵀ d} along u in the places of `primal`."""
    needs = (*wanted[:3], *wanted[7:])
    if all(t is None for t in u):
        return (None,) * 4, (None,) * len(primal)
    ty, th_n, tc_n, tcells, tgates = LSTMTangentFunction.apply(*u, *primal)
    tdx = tdh0 = tdc0 = None
    tdweights: Sequence[Tensor | None] = (None,) * len(primal[7:])
    if any(needs):
        tdx, tdh0, tdc0, *tdweights = LSTMSecondFunction.apply(
            needs, dpre, dh, ty, tgates, tcells, *outer, *(None,) * 4, *u, *primal
        )
    return (ty, th_n, tc_n, tcells), (tdx, tdh0, tdc0, None, None, None, None, *tdweights)


def _is_tracked(t: Tensor) -> bool:
    """Whether another transform looks at `t`, to which an op would be opaque."""
    if t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _parts(rest: Sequence) -> tuple[Sequence, Sequence, tuple[Sequence, Sequence]]:
    """Split outer and its tangents, four each, from u and primal."""
    return rest[:4], rest[4:8], _halves(rest[8:])


def _halves(tensors: Sequence) -> tuple[Sequence, Sequence]:
    """Split (tx, th0, tc0, *tweights) from (the seven of a primal, *weights)."""
    n = 3 + (len(tensors) - 10) // 2
    return tensors[:n], tensors[n:]


def vmap_by_loop(function: Any, info: Any, in_dims: tuple, *args: Any) -> tuple:
    """Apply `function` to one sample after the other and stack what comes out."""

    def one(n: int) -> tuple[Tensor | None, ...]:
        return function.apply(
            *(
                a.select(dim, n) if isinstance(dim, int) else a
                for a, dim in zip(args, in_dims, strict=True)
            )
        )

    outputs = zip(*(one(n) for n in range(info.batch_size)), strict=True)
    stacked = tuple(None if o[0] is None else torch.stack(o) for o in outputs)
    return stacked, tuple(None if o is None else 0 for o in stacked)


def fold(t: Tensor, dim: int | None, at: int, n: int) -> Tensor:
    """Merge the vmapped dimension `dim` into the one before `at`; an unbatched `t` is repeated."""
    batched = (
        t.unsqueeze(at).expand(*t.shape[:at], n, *t.shape[at:])
        if dim is None
        else t.movedim(dim, at)
    )
    return batched.flatten(at - 1, at)
