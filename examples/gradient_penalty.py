"""A Wasserstein GAN of text with a gradient penalty, critic and generator both LSTMs.

The critic scores 32 characters, the real ones as one-hot vectors and the generator's as
probabilities. Its slope between the two is held at 1 by a penalty on its gradient (Gulrajani et
al. 2017, arXiv:1704.00028), so that training it differentiates a gradient. cuDNN's and oneDNN's
LSTMs have no such second derivative; torch_manual's is derived by hand.

    python examples/gradient_penalty.py                    the Python language reference, 30 seconds
    python examples/gradient_penalty.py --text book.txt --steps 5000 --hidden 256
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from _options import OneLineParser, number
from _text import Problem, alphabet_of, encode, read_text
from torch import Tensor, nn

import torch_manual

LENGTH = 32  # characters that critic and generator see
PENALTY = 10.0  # λ of the paper
LINES = 10  # of progress


class Generator(nn.Module):
    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.lstm = torch_manual.LSTM(hidden, hidden)
        self.head = torch_manual.Linear(hidden, vocabulary)

    def forward(self, noise: Tensor) -> Tensor:
        """Map (T, B, hidden) noise to (T, B, vocabulary) probabilities."""
        return torch.softmax(self.head(self.lstm(noise)[0]), -1)


class Critic(nn.Module):
    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.lstm = torch_manual.LSTM(vocabulary, hidden, bidirectional=True)
        self.head = torch_manual.Linear(2 * hidden, 1)

    def forward(self, text: Tensor) -> Tensor:
        """Map (T, B, vocabulary) to B scores, high for text that looks real."""
        return self.head(self.lstm(text)[0].mean(0)).squeeze(-1)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The mean of (‖∂score/∂text‖ − 1)² at random places between real and fake texts."""
    share = torch.rand(1, real.shape[1], 1)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((slope.norm(dim=(0, 2)) - 1) ** 2).mean()


class Game:
    """The two players and the text."""

    def __init__(self, text: str, options: argparse.Namespace) -> None:
        self.alphabet = alphabet_of(text)
        self.ids = encode(text, self.alphabet)
        self.batch, self.hidden = options.batch, options.hidden
        vocabulary = len(self.alphabet)
        self.generator = Generator(vocabulary, options.hidden)
        self.critic = Critic(vocabulary, options.hidden)
        self.generator_optimizer, self.critic_optimizer = (
            torch.optim.Adam(player.parameters(), lr=options.lr, betas=(0.5, 0.9))
            for player in (self.generator, self.critic)
        )

    def real(self) -> Tensor:
        starts = torch.randint(len(self.ids) - LENGTH, (self.batch,))
        return F.one_hot(
            self.ids[starts + torch.arange(LENGTH)[:, None]], len(self.alphabet)
        ).float()

    def fake(self) -> Tensor:
        return self.generator(torch.randn(LENGTH, self.batch, self.hidden))

    def train_critic(self) -> tuple[float, float]:
        """Return the penalty and by how much the critic prefers real text."""
        real, fake = self.real(), self.fake().detach()
        preference = self.critic(real).mean() - self.critic(fake).mean()
        penalty = gradient_penalty(self.critic, real, fake)
        self.critic_optimizer.zero_grad()
        (PENALTY * penalty - preference).backward()
        self.critic_optimizer.step()
        return penalty.item(), preference.item()

    def train_generator(self) -> None:
        self.generator_optimizer.zero_grad()
        (-self.critic(self.fake()).mean()).backward()
        self.generator_optimizer.step()

    @torch.no_grad()
    def sample(self) -> str:
        return "".join(self.alphabet[k] for k in self.fake()[:, 0].argmax(-1).tolist())


def words_of(text: str) -> str:
    """Return the text in small letters with one space for everything else."""
    return re.sub("[^a-z]+", " ", text.lower())


def play(options: argparse.Namespace) -> list[float]:
    """Train, say how it goes, and return the penalty of every step."""
    torch.manual_seed(options.seed)
    text = words_of(read_text(options.text))
    if len(text) <= LENGTH:
        raise Problem(f"the text is too short: it has {len(text)} letters and spaces")
    game = Game(text, options)
    print(f"text: {len(text):,} letters and spaces")
    penalties: list[float] = []
    preferences: list[float] = []
    every = math.ceil(options.steps / LINES)
    for step in range(1, options.steps + 1):
        penalty, preference = game.train_critic()
        penalties.append(penalty)
        preferences.append(preference)
        game.train_generator()
        if step % every == 0 or step == 1:
            print(
                f"step {step:5}  penalty {mean(penalties[-every:]):.4f}  "
                f"real over fake {mean(preferences[-every:]):+.3f}  {game.sample()!r}",
                flush=True,
            )
    print(f"the penalty went from {penalties[0]:.4f} to {mean(penalties[-every:]):.4f}")
    return penalties


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    count = number(int, lambda x: 0 < x < 2**31, "a positive integer")
    rate = number(float, lambda x: 0 < x < 1, "a positive number below 1")
    parser = OneLineParser(
        prog="gradient_penalty", description="Train a Wasserstein GAN of text on LSTMs."
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 (default: the language reference)")
    parser.add_argument("--steps", type=count, default=200, help="default: %(default)s")
    parser.add_argument("--batch", type=count, default=32, help="default: %(default)s")
    parser.add_argument("--hidden", type=count, default=64, help="default: %(default)s")
    parser.add_argument("--lr", type=rate, default=0.002, help="default: %(default)s")
    parser.add_argument("--seed", type=count, default=1, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        play(parse(argv))
    except (Problem, OSError) as error:
        print(f"gradient_penalty: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
