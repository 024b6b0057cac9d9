"""The judge: a small classifier of what a picture shows, for prompt accuracy and as the space of Fréchet distance."""

import itertools

import torch
from torch import nn

from .scenes import COLOURS, LAYOUTS, PAIRS, SHAPES, SIZES, Scene, Thing

_COLOURS = tuple(COLOURS)
# Each head answers one question; "first" is the only, left or upper thing of a scene.
HEADS = {
    "layout": LAYOUTS,
    "background": _COLOURS,
    "first size": SIZES,
    "first colour": _COLOURS,
    "first shape": SHAPES,
    "second size": SIZES,
    "second colour": _COLOURS,
    "second shape": SHAPES,
}
FEATURES = 128
IGNORE = -1


class Judge(nn.Module):
    """Convolutions down to 4x4, one hidden layer (the features), one linear head over all questions."""

    def __init__(self):
        super().__init__()
        widths, layers = (3, 32, 64, 96, 128), []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, FEATURES))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, sum(map(len, HEADS.values()))))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, 64, 64) in [0, 1] -> (b, FEATURES)."""
        return self.trunk(images * 2 - 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(b, 3, 64, 64) in [0, 1] -> logits (b, answers) for each question of `HEADS`."""
        logits = self.head(self.features(images)).split([len(answers) for answers in HEADS.values()], dim=1)
        return dict(zip(HEADS, logits, strict=True))


def answers(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """The right answer to each question as an index, `IGNORE` where a scene has no second thing."""

    def of_thing(thing) -> list[int]:
        return [SIZES.index(thing.size), _COLOURS.index(thing.colour), SHAPES.index(thing.shape)]

    rows = []
    for scene in scenes:
        second = of_thing(scene.things[1]) if len(scene.things) == 2 else [IGNORE] * 3
        row = [LAYOUTS.index(scene.layout), _COLOURS.index(scene.background), *of_thing(scene.things[0]), *second]
        rows.append(row)
    return dict(zip(HEADS, torch.tensor(rows).unbind(1), strict=True))


@torch.no_grad()
def correct(judge: Judge, images: torch.Tensor, scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """For each question whether the picture shows what its scene says (b,); open questions count as right."""
    logits, wanted = judge(images), answers(scenes)
    return {name: (logits[name].argmax(1) == wanted[name]) | (wanted[name] == IGNORE) for name in HEADS}


def prompt_accuracy(judge: Judge, images: torch.Tensor, scenes: list[Scene]) -> float:
    """The share of pictures in which *every* attribute of the caption is right."""
    return torch.stack(list(correct(judge, images, scenes).values())).all(0).float().mean().item()


@torch.no_grad()
def recognised(judge: Judge, images: torch.Tensor) -> list[Scene]:
    """What the judge sees in each picture."""
    indices = torch.stack([logits.argmax(1) for logits in judge(images).values()], dim=1)
    scenes = []
    for row in indices.tolist():
        layout, background, *rest = (choices[i] for choices, i in zip(HEADS.values(), row, strict=True))
        things = (Thing(*rest[:3]), Thing(*rest[3:]))
        scenes.append(Scene(layout, background, things if layout in PAIRS else things[:1]))
    return scenes


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Fréchet distance between two sets of features (n, d), each taken as a Gaussian (Heusel et al. 2017)."""
    x, y = features.double(), reference.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    # tr sqrt(A B) = sum of sqrt of the eigenvalues of A B, which are real and not negative for covariances.
    cross = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return (mean + cov_x.trace() + cov_y.trace() - 2 * cross).item()
