"""Train a classifier in which no single example shows: DP-SGD on per-sample gradients.

Which source is a slice of 24 characters from: the prose of the Python language reference, Python
code, or the names of Unicode characters? Every step clips the gradient of each slice in the batch,
adds noise to their sum and so bounds what anybody can learn about one slice (Abadi et al. 2016,
arXiv:1607.00133). The per-sample gradients are one call, `vmap(grad(loss))`: the LSTM runs once on
the whole batch, and the weights' gradients are one batched matrix product.

    python examples/per_sample_gradients.py                about 20 seconds
    python examples/per_sample_gradients.py --noise 0      clipped, but not private
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from _options import OneLineParser, number
from _text import Problem, alphabet_of, encode, read_text
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import torch_manual

LENGTH = 24
HELD_OUT = 0.2
DELTA = 1e-5  # the probability with which the privacy bound may fail
LINES = 10  # of progress

Parameters = dict[str, Tensor]


class Classifier(nn.Module):
    def __init__(self, vocabulary: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.embedding = torch_manual.Embedding(vocabulary, hidden)
        self.lstm = torch_manual.LSTM(hidden, hidden)
        self.head = torch_manual.Linear(hidden, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (T,) or (T, B) character numbers to class scores."""
        return self.head(self.lstm(self.embedding(ids))[0].mean(0))


def sources() -> dict[str, str]:
    """Three kinds of text that come with Python."""
    names = (unicodedata.name(chr(code), "") for code in range(0x3000))
    code = "".join(inspect.getsource(module) for module in (argparse, inspect))
    return {"prose": read_text(None), "code": code, "names": " ".join(names)}


def slices(texts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
    """Cut the texts; return (LENGTH, N) character numbers, N labels, the size of the alphabet."""
    shortest = min(len(text) for text in texts) // LENGTH * LENGTH
    alphabet = alphabet_of("".join(text[:shortest] for text in texts))
    cut = [encode(text[:shortest], alphabet).view(-1, LENGTH) for text in texts]
    labels = torch.arange(len(texts)).repeat_interleave(shortest // LENGTH)
    return torch.cat(cut).t(), labels, len(alphabet)


def per_sample_gradients(model: nn.Module, ids: Tensor, labels: Tensor) -> Parameters:
    """Return every parameter's gradient of the loss of each sample, samples first."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Parameters, ids: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (ids,)), label)

    return vmap(grad(loss), in_dims=(None, 1, 0))(parameters, ids, labels)


def norms_of(gradients: Parameters) -> Tensor:
    """The length of each sample's gradient, all parameters together."""
    squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def private_mean(gradients: Parameters, clip: float, noise: float, batch: int) -> Parameters:
    """Clip each sample's gradient to length `clip`, sum, add noise, divide by the mean batch."""
    scale = (clip / norms_of(gradients)).clamp(max=1)
    means = {}
    for name, g in gradients.items():
        total = torch.tensordot(scale, g, dims=1)
        means[name] = (total + noise * clip * torch.randn_like(total)) / batch
    return means


def privacy_spent(share: float, noise: float, steps: int) -> float:
    """Return ε at DELTA, from the Rényi divergences of the subsampled Gaussian mechanism.

    Every sample enters a batch with probability `share` (Mironov et al. 2019, arXiv:1908.10530;
    from divergence to ε: Canonne et al. 2020, arXiv:2004.00010, proposition 12).
    """
    if noise**2 == 0:
        return math.inf

    def divergence(order: int) -> float:
        log_terms = [
            math.log(math.comb(order, k))
            + k * math.log(share)
            + (order - k) * math.log1p(-share)
            + k * (k - 1) / (2 * noise**2)
            for k in range(order + 1)
        ]
        return torch.tensor(log_terms, dtype=torch.float64).logsumexp(0).item() / (order - 1)

    orders = range(2, 65)
    return min(
        steps * divergence(a) + math.log1p(-1 / a) - math.log(DELTA * a) / (a - 1) for a in orders
    )


def train(options: argparse.Namespace) -> float:
    """Train, say how it goes, and return the accuracy on texts that were not trained on."""
    torch.manual_seed(options.seed)
    texts = sources()
    ids, labels, vocabulary = slices(list(texts.values()))
    order = torch.randperm(len(labels))
    held_out, trained = order.split([k := int(HELD_OUT * len(order)), len(order) - k])
    model = Classifier(vocabulary, options.hidden, len(texts))
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    share = options.batch / len(trained)
    if share >= 1:
        raise Problem(f"--batch must be less than the {len(trained):,} slices to train on")
    print(f"{len(trained):,} slices of {', '.join(texts)} to train on, {len(held_out):,} held out")
    every = math.ceil(options.steps / LINES)
    accuracy = 0.0
    for step in range(1, options.steps + 1):
        batch = trained[torch.rand(len(trained)) < share]
        gradients = per_sample_gradients(model, ids[:, batch], labels[batch])
        private = private_mean(gradients, options.clip, options.noise, options.batch)
        for name, parameter in model.named_parameters():
            parameter.grad = private[name]
        optimizer.step()
        if step % every == 0 or step == options.steps:
            accuracy = accuracy_on(model, ids[:, held_out], labels[held_out])
            norms = norms_of(gradients)
            spent = privacy_spent(share, options.noise, step)
            print(
                f"step {step:4}  accuracy {accuracy:.1%}  gradient norms: median "
                f"{norms.median():.2f}, largest {norms.max():.2f}, "
                f"{(norms > options.clip).float().mean():4.0%} clipped  ε {spent:.2f}",
                flush=True,
            )
    return accuracy


@torch.no_grad()
def accuracy_on(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    return (model(ids).argmax(-1) == labels).float().mean().item()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    count = number(int, lambda x: 0 < x < 2**31, "a positive integer")
    batch = number(int, lambda x: 16 <= x < 2**31, "an integer of 16 or more")
    positive = number(float, lambda x: 0 < x < math.inf, "a positive number")
    at_least_0 = number(float, lambda x: 0 <= x < math.inf, "at least 0")
    parser = OneLineParser(
        prog="per_sample_gradients", description="Train a classifier of texts with DP-SGD."
    )

    def add(name: str, **settings: object) -> None:
        parser.add_argument(name, **settings)  # type: ignore[arg-type]

    add("--steps", type=count, default=200, help="default: %(default)s")
    add("--batch", type=batch, default=128, help="mean size of a batch (default: %(default)s)")
    add("--hidden", type=count, default=64, help="default: %(default)s")
    add("--clip", type=positive, default=1.0, help="longest gradient (default: %(default)s)")
    add("--noise", type=at_least_0, default=1.0, help="in units of --clip (default: %(default)s)")
    add("--lr", type=positive, default=0.01, help="default: %(default)s")
    add("--seed", type=count, default=1, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        train(parse(argv))
    except (Problem, OSError) as error:
        print(f"per_sample_gradients: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
