"""Do trained layers choose well? Digits in noise or haze, by a layer's own choice and by as much that is random."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saccade.bench.recall import Outcome
from saccade.catalog import get
from saccade.models.digits import CLASSES, SIDE, Canvases, Digits, load_digits

WIDTH, SLOTS, PATCH = 32, 4, 4
"""Channels of a model; slots of a canvas and pixels of a patch, along each axis."""

GRID, PARTS = SLOTS * SIDE // PATCH, SIDE // PATCH
"""Patches of a canvas and of a digit, along each axis."""

BATCH, JUDGED = 32, 1000
"""Images of a step, and those that a model is judged on."""


class Learner(nn.Module):
    """A model around one layer, and the task it learns.

    Args:
        drawn: Replace what the layer chooses by as much that is random.
        seed: Of that.
    """

    name: ClassVar[str]
    settings: ClassVar[dict[str, Any]]

    def __init__(self, *, drawn: bool, seed: int) -> None:
        super().__init__()
        self.layer: Any = get(self.name).build(**self.settings)
        self.random = torch.Generator().manual_seed(seed)
        self.read: float | None = None
        if drawn:
            self.draw()

    @abstractmethod
    def draw(self) -> None:
        """Make the layer's choice random."""

    @abstractmethod
    def loss(self, digits: Digits, generator: torch.Generator, done: float) -> Tensor:
        """Of a new batch, when a part `done` of all steps is behind."""

    @abstractmethod
    def score(self, digits: Digits, generator: torch.Generator) -> float:
        """How well it does on `JUDGED` new images, 1 at best."""

    def shuffled(self, x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        """The values in a random order along an axis, another in each row, and where each was."""
        order = torch.rand(x.shape, generator=self.random).argsort(dim)
        return x.gather(dim, order), order


class Reader(Learner):
    """Says which digit is on a canvas, from its patches."""

    def __init__(self, *, drawn: bool, seed: int) -> None:
        super().__init__(drawn=drawn, seed=seed)
        self.embed = nn.Sequential(nn.Linear(PATCH**2, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.place = nn.Parameter(torch.randn(PARTS, PARTS, WIDTH) / 2)  # where in a slot, not in which slot
        self.asking = nn.Parameter(torch.randn(WIDTH) / 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    @abstractmethod
    def forward(self, canvases: Canvases) -> tuple[Tensor, Tensor | float]:
        """Scores `[B, CLASSES]`, and what the layer's own training adds to the loss."""

    def loss(self, digits: Digits, generator: torch.Generator, done: float) -> Tensor:  # noqa: ARG002
        """Cross entropy, and the layer's own loss."""
        canvases = digits.canvases(BATCH, SLOTS, generator)
        scores, added = self(canvases)
        return nn.functional.cross_entropy(scores, canvases.labels) + added

    def score(self, digits: Digits, generator: torch.Generator) -> float:
        """Share of the canvases that are read right."""
        canvases = digits.canvases(JUDGED, SLOTS, generator)
        return float((self(canvases)[0].argmax(-1) == canvases.labels).float().mean())

    def tokens(self, canvases: Canvases) -> Tensor:
        """Embedded patches `[B, GRID^2, WIDTH]`."""
        embedded = self.embed(canvases.patches(PATCH) * 2 - 1) + self.place.repeat(SLOTS, SLOTS, 1)
        return embedded.flatten(1, 2)


class SelectAndPack(Reader):
    """Sums what becomes of the selected patches. The gate is told where the digit is, as labels tell the paper's."""

    name = "select_and_pack"
    settings: ClassVar = {"dim": WIDTH, "heads": 4, "container": 16}

    def draw(self) -> None:
        """Of each canvas as many patches as the gate selects."""
        slots = self.layer._slots  # noqa: SLF001  what is kept, bool [B, N]
        self.layer._slots = lambda kept: slots(self.shuffled(kept)[0])  # noqa: SLF001

    def forward(self, canvases: Canvases) -> tuple[Tensor, Tensor | float]:
        """Scores, and the gate's loss."""
        tokens = self.tokens(canvases)
        scores = self.layer.scores(tokens)
        self.read = float((scores > 0).float().mean())
        added = self.layer.selection_loss(scores, canvases.marked(PATCH).flatten(1))
        return self.head(self.layer(tokens).sum(1) / PARTS**2), added


class Sparsifiner(Reader):
    """A token more asks. Half of the training is dense, for the predictor to learn from, as in the authors' stages."""

    name = "sparsifiner"
    settings: ClassVar = {
        "dim": WIDTH, "tokens": GRID**2 + 1, "heads": 2, "keep": PARTS**2 / (GRID**2 + 1), "reduce_tokens": 2,
        "class_tokens": 0,
    }  # fmt: skip

    def draw(self) -> None:
        """For each query as many keys."""

        def connectivity(q: Tensor, k: Tensor) -> Tensor:
            every = torch.arange(k.shape[2]).expand(*q.shape[:3], -1)
            return self.shuffled(every)[0][..., : self.layer.budget]

        self.layer.connectivity = connectivity

    def loss(self, digits: Digits, generator: torch.Generator, done: float) -> Tensor:
        """All keys in the first half."""
        budget = self.layer.budget
        self.layer.budget = self.layer.count if done < 0.5 else budget
        try:
            return super().loss(digits, generator, done)
        finally:
            self.layer.budget = budget

    def forward(self, canvases: Canvases) -> tuple[Tensor, Tensor | float]:
        """Scores, and how far the predicted map is from the layer's own."""
        tokens = self.tokens(canvases)
        tokens = torch.cat([self.asking.expand(len(tokens), 1, -1), tokens], 1)
        self.read = self.layer.budget / self.layer.count
        added = self.layer.reconstruction_loss(tokens) / self.layer.count if self.training else 0.0
        return self.head(self.layer(tokens)[:, 0]), added


class HighResolution(Reader):
    """A token asks a blurred canvas; the map of where it looked chooses the patches that it reads next."""

    name = "high_resolution"
    settings: ClassVar = {
        "dim": WIDTH, "heads": 4, "grid": (SLOTS, SLOTS), "zoom": PARTS, "regions": SLOTS, "threshold": 0.5,
    }  # fmt: skip

    def __init__(self, *, drawn: bool, seed: int) -> None:
        super().__init__(drawn=drawn, seed=seed)
        self.first: Any = get(self.name).build(**self.settings)
        self.blurred = nn.Sequential(nn.Linear(PARTS**2, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def draw(self) -> None:
        """As many patches, of random slots."""
        chosen = self.layer.chosen
        self.layer.chosen = lambda seen: chosen(self.shuffled(seen)[0])

    def forward(self, canvases: Canvases) -> tuple[Tensor, Tensor | float]:
        """Scores; nothing is added to the loss."""
        fine = self.tokens(canvases)
        means = canvases.patches(PATCH).mean(-1)
        coarse = self.blurred(means.unfold(1, PARTS, PARTS).unfold(2, PARTS, PARTS).flatten(3) * 2 - 1).flatten(1, 2)
        x = torch.cat([coarse, self.asking.expand(len(fine), 1, -1)], 1)
        out, seen = self.first.with_map(x, fine, fine.new_zeros(len(fine), 1, SLOTS**2))  # an even map chooses nothing
        self.read = float(self.layer.chosen(seen.detach()).float().mean())
        x = x + out
        return self.head((x + self.layer(x, fine, seen))[:, -1]), 0.0


class Histogram(Learner):
    """Lifts the haze from images of 16 x 16 pixels, each a token."""

    name = "histogram"
    settings: ClassVar = {"dim": 16, "heads": 4, "bins": 8}

    def __init__(self, *, drawn: bool, seed: int) -> None:
        super().__init__(drawn=drawn, seed=seed)
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)

    def draw(self) -> None:
        """A random order for each that is sorted by intensity."""
        self.layer._sort = self.shuffled  # noqa: SLF001

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 16, 16]` without haze."""
        return self.last(nn.functional.gelu(self.layer(self.first(images[:, None]))))[:, 0]

    def loss(self, digits: Digits, generator: torch.Generator, done: float) -> Tensor:  # noqa: ARG002
        """Mean square of what is still wrong."""
        hazed, clear = digits.hazed(BATCH, 16, generator)
        return nn.functional.mse_loss(self(hazed), clear)

    def score(self, digits: Digits, generator: torch.Generator) -> float:
        """Share of the clear images' variance that is got right."""
        hazed, clear = digits.hazed(JUDGED, 16, generator)
        return 1 - float(nn.functional.mse_loss(self(hazed), clear) / clear.var())


LEARNERS: dict[str, type[Learner]] = {
    learner.name: learner for learner in (HighResolution, Histogram, SelectAndPack, Sparsifiner)
}


def learn_digits(name: str, steps: int = 400, seed: int = 0) -> Outcome:
    """Train a layer of `LEARNERS` on its task, and the same with a random choice.

    Args:
        name: Mechanism.
        steps: Of the optimizer.
        seed: Of everything that is drawn.

    Returns:
        Scores on images of digits that were never trained on, and what part of the patches the trained choice reads.

    Raises:
        ValueError: If the mechanism is not one of `LEARNERS`.
    """
    if name not in LEARNERS:
        raise ValueError(f"name={name!r}: expected one of {sorted(LEARNERS)}")
    train, held_out = load_digits()
    scores, reads = [], []
    with torch.random.fork_rng(devices=[]):
        for drawn in (False, True):
            torch.manual_seed(seed)
            model = LEARNERS[name](drawn=drawn, seed=seed)
            generator = torch.Generator().manual_seed(seed + 1)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for step in range(steps):
                loss = model.loss(train, generator, step / steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                scores.append(model.score(held_out, torch.Generator().manual_seed(seed + 2)))
            reads.append(model.read)
    return Outcome(name, scores[0], scores[1], reads[0])
