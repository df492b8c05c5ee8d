"""The only reference: step equations in plain torch under autograd, nothing of the project in it.

A batch of unequal lengths is computed one sequence at a time, so that nothing of packing is shared
with what is tested. Outputs past a sequence's end are zero.
"""

import torch

FIELDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
FIELDS += ("weight_ci", "weight_cf", "weight_co")


def lstm_step(x, h, c, w):
    """One step of one direction; `w` maps names to weights, absent ones are not used."""
    pre = x @ w["weight_ih"].T + h @ w["weight_hh"].T
    if "bias_ih" in w:
        pre = pre + w["bias_ih"] + w["bias_hh"]
    H = c.shape[-1]
    i = torch.sigmoid(pre[..., :H] + _peep(c, w.get("weight_ci")))
    f = torch.sigmoid(pre[..., H : 2 * H] + _peep(c, w.get("weight_cf")))
    g = torch.tanh(pre[..., 2 * H : 3 * H])
    c = f * c + i * g
    o = torch.sigmoid(pre[..., 3 * H :] + _peep(c, w.get("weight_co")))
    h = o * torch.tanh(c)
    if "weight_hr" in w:
        h = h @ w["weight_hr"].T
    return h, c


def _peep(c, weight):
    if weight is None:
        return 0.0
    return torch.einsum("...j,kj->...k", c, weight if weight.dim() == 2 else torch.diag(weight))


def lstm_direction(x, h, c, w, reverse=False):
    """x (T, B, I), h (B, P), c (B, H) → y (T, B, P), cells (T, B, H), h_n, c_n."""
    ys, cs = [None] * len(x), [None] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        h, c = lstm_step(x[t], h, c, w)
        ys[t], cs[t] = h, c
    return torch.stack(ys), torch.stack(cs), h, c


def lstm(x, h0, c0, params, num_layers=1, bidirectional=False, lengths=None):
    """All layers and directions; `params` maps torch.nn's names to tensors.

    Returns y (T, B, D·P), h_n, c_n, and the cells of the last layer (T, B, D·H).
    """
    D = 1 + bidirectional
    h_n, c_n, cells = [], [], None
    for layer in range(num_layers):
        outputs = []
        for d in range(D):
            suffix = f"_l{layer}" + ("_reverse" if d else "")
            w = {k: params[k + suffix] for k in FIELDS if k + suffix in params}
            k = layer * D + d
            outputs.append(_lengths(x, h0[k], c0[k], w, bool(d), lengths))
        y, cells, h, c = zip(*outputs, strict=True)
        x, cells = torch.cat(y, -1), torch.cat(cells, -1)
        h_n.extend(h)
        c_n.extend(c)
    return x, torch.stack(h_n), torch.stack(c_n), cells


def _lengths(x, h0, c0, w, reverse, lengths):
    if lengths is None:
        return lstm_direction(x, h0, c0, w, reverse)
    T = len(x)
    each = []
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        y, cells, h, c = lstm_direction(x[:n, one], h0[one], c0[one], w, reverse)
        pad = (0, 0, 0, 0, 0, T - n)
        pad_ = torch.nn.functional.pad
        each.append((pad_(y, pad), pad_(cells, pad), h, c))
    y, cells, h, c = zip(*each, strict=True)
    return torch.cat(y, 1), torch.cat(cells, 1), torch.cat(h), torch.cat(c)
