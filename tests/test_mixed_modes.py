"""Ways to mix forward mode, reverse mode and vmap, with and without grad mode, as plain ops do."""

import pytest
import torch
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap

import reference
import torch_manual
from cases import CASES, Sample, run_reference

SAMPLES = (
    Sample("one-layer", 3, 2, 2, 3),
    Sample("deep", 3, 2, 2, 3, {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
)


def layer(case, sample):
    """(x → y of ours, x → y in plain ops), and x."""
    module = case.build(sample, return_cells=True)
    x, h0, c0 = sample.inputs()
    states = h0.detach(), c0.detach()
    parameters = dict(module.named_parameters())
    return (
        lambda x: module(x, states)[0],
        lambda x: run_reference(case, sample, parameters, x, *states)[0],
        x,
    )


def cell(cls, **kwargs):
    module = cls(2, 3, dtype=torch.float64, **kwargs)
    parameters = dict(module.named_parameters())
    zeros = torch.zeros(2, 3, dtype=torch.float64)

    def loop(step):
        def run(x):
            state, out = (zeros, zeros), []
            for x_t in x:
                state = step(x_t, state)
                out.append(state[0])
            return torch.stack(out)

        return run

    x = torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = loop(lambda x, state: reference.lstm_step(x, *state, parameters))
    return loop(module), plain, x.requires_grad_()


MODELS = {f"{c.name}-{s.id}": (lambda c=c, s=s: layer(c, s)) for c in CASES for s in SAMPLES}
MODELS["cell"] = lambda: cell(torch_manual.LSTMCell)
MODELS["peephole-cell"] = lambda: cell(torch_manual.PeepholeLSTMCell)


def loss_of(f):
    return lambda x: f((x * x.cos()).tanh()).sin().sum()


def pulled_back(f):
    def gradient(x):
        out, pull_back = vjp(loss_of(f), x)
        return pull_back(torch.ones_like(out))[0]

    return gradient


def dual_level_around_a_backward_pass(f, x, v):
    with forward_ad.dual_level():
        y = loss_of(f)(forward_ad.make_dual(x, v))
        return forward_ad.unpack_dual(torch.autograd.grad(y, x)[0]).tangent


def dual_input_of_the_layer(f, x, v):
    with forward_ad.dual_level():
        y = f(forward_ad.make_dual(x, v)).sin().sum()
        return forward_ad.unpack_dual(torch.autograd.grad(y, x)[0]).tangent


def dual_cotangent(f, x, v):
    y = f(x)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), y.detach().cos())
        return forward_ad.unpack_dual(torch.autograd.grad(y, x, dy)[0]).tangent


@torch.no_grad()
def jvp_of_vjp_without_grad_mode(f, x, v):
    return jvp(pulled_back(f), (x,), (v,))[1]


def pull_back_without_grad_mode(f, x, v):
    def gradient(x):
        out, pull_back = vjp(loss_of(f), x)
        with torch.no_grad():
            return pull_back(torch.ones_like(out))[0]

    return jvp(gradient, (x.detach(),), (v,))[1]


@torch.no_grad()
def vjp_of_vjp_without_grad_mode(f, x, v):
    return vjp(pulled_back(f), x.detach())[1](v)[0]


def without_grad_mode(transform):
    @torch.no_grad()
    def way(f, x, v):
        return transform(loss_of(f))(x.detach())

    return way


@torch.no_grad()
def vmap_of_vjp_without_grad_mode(f, x, v):
    return vmap(lambda x: pulled_back(f)(x))(torch.stack([x.detach(), v]))


def batch_of(y):
    """Cotangents of y, or tangents."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, *y.shape, dtype=y.dtype, generator=generator)


def vmap_of_autograd_grad(f, x, v):
    y = f(x)
    return vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(batch_of(y))


def graph_of_vmapped_gradients(f, x, v):
    y = f(x)
    dx = vmap(lambda dy: torch.autograd.grad(y, x, dy, create_graph=True)[0])(batch_of(y))
    return torch.autograd.grad(dx.pow(2).sum() + y.pow(2).sum(), x)[0]


def batched_gradients(f, x, v):
    y = f(x)
    return torch.autograd.grad(y, x, batch_of(y), is_grads_batched=True)[0]


def graph_of_batched_gradients(f, x, v):
    y = f(x)
    (dx,) = torch.autograd.grad(y, x, batch_of(y), is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(dx.pow(2).sum() + y.pow(2).sum(), x)[0]


def batched_second_order(f, x, v):
    (dx,) = torch.autograd.grad(loss_of(f)(x), x, create_graph=True)
    return torch.autograd.grad(dx, x, batch_of(x), is_grads_batched=True)[0]


def vectorized_hessian(f, x, v):
    return torch.autograd.functional.hessian(loss_of(f), x.detach(), vectorize=True)


def hvp(f, x, v):
    """The derivative of a double backward along the vector in it, in which that is linear."""
    return torch.autograd.functional.hvp(loss_of(f), x.detach(), v)[1]


def gradient_of_vhp_along_its_vector(f, x, v):
    v = v.clone().requires_grad_()
    vhp = torch.autograd.functional.vhp(loss_of(f), x.detach(), v, create_graph=True)[1]
    return torch.autograd.grad(vhp.sin().sum(), v)[0]


def jacobian_of_a_forward_over_reverse_along_its_vector(f, x, v):
    gradient = pulled_back(f)
    return jacrev(lambda v: jvp(gradient, (x.detach(),), (v,))[1])(v)


WAYS = {
    way.__name__: way
    for way in (
        dual_level_around_a_backward_pass,
        dual_input_of_the_layer,
        dual_cotangent,
        jvp_of_vjp_without_grad_mode,
        pull_back_without_grad_mode,
        vjp_of_vjp_without_grad_mode,
        vmap_of_vjp_without_grad_mode,
        vmap_of_autograd_grad,
        graph_of_vmapped_gradients,
        batched_gradients,
        graph_of_batched_gradients,
        batched_second_order,
        vectorized_hessian,
        hvp,
        gradient_of_vhp_along_its_vector,
        jacobian_of_a_forward_over_reverse_along_its_vector,
    )
}
WAYS["hessian_without_grad_mode"] = without_grad_mode(hessian)
WAYS["jacrev_without_grad_mode"] = without_grad_mode(jacrev)
WAYS["jacrev_of_jacrev_without_grad_mode"] = without_grad_mode(lambda f: jacrev(jacrev(f)))
WAYS["jacrev_of_jacfwd_without_grad_mode"] = without_grad_mode(lambda f: jacrev(jacfwd(f)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_as_plain_ops_do(model, way):
    ours, plain, x = MODELS[model]()
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    found, expected = (WAYS[way](f, x, v) for f in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_batched_gradients_within_batched_gradients_are_refused():
    module = torch_manual.LSTM(2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    y = module(x)[0]
    dys = batch_of(y)

    def batched(scale):
        return torch.autograd.grad(y, x, scale * dys, is_grads_batched=True)[0]

    with pytest.raises(RuntimeError, match="within batched gradients"):
        _vmap(batched)(torch.ones(2, dtype=torch.float64))
