"""What the toy draws: scenes, their captions, and anti-aliased pictures of them, all made by code.

A scene has a background colour and one or two objects. One object is in one of five places; two objects
are side by side or one above the other. A caption may name everything (`caption`) or only a part
(`partial_caption`), so that the text encoder also learns fragments such as "blue background" or "a star".
"""

import hashlib
import itertools
import math
import random
from dataclasses import dataclass

import torch

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 80, 220),
    "yellow": (240, 220, 50),
    "purple": (145, 60, 190),
    "orange": (245, 135, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SIZES = ("small", "large")
PLACES = ("center", "top left", "top right", "bottom left", "bottom right")
PAIRS = ("horizontal", "vertical")
LAYOUTS = PLACES + PAIRS
IMAGE_SIZE = 64
# Never in a negative prompt of a training, so that negative prompts are also measured with words that are new there.
HELD_OUT_UNWANTED = ("yellow", "purple", "star", "ring")

_WORDS = "a an the in of on and above below left right top bottom center background shape"
WORDS = tuple(_WORDS.split()) + SIZES + tuple(COLOURS) + SHAPES


@dataclass(frozen=True)
class Thing:
    """One object of a scene: its size, colour and shape, as words."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Description:
    """Attributes of a thing, as words; None leaves one open."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def attributes(self) -> dict[str, str]:
        """Those that are not open."""
        return {name: word for name, word in vars(self).items() if word is not None}

    def text(self) -> str:
        words = (self.size, self.colour, self.shape or "shape")
        return _with_articles(" ".join(["a", *filter(None, words)]))

    def describes(self, thing: Thing) -> bool:
        return all(getattr(thing, name) == word for name, word in self.attributes().items())


@dataclass(frozen=True)
class Scene:
    """What a caption describes. `things` are ordered left to right, or top to bottom."""

    layout: str
    background: str
    things: tuple[Thing, ...]


def random_scene(rng: random.Random) -> Scene:
    """A scene with every attribute drawn uniformly; things never have the background's colour."""
    layout = rng.choice(PLACES) if rng.random() < 0.5 else rng.choice(PAIRS)
    background = rng.choice(tuple(COLOURS))
    visible = [colour for colour in COLOURS if colour != background]
    count = 2 if layout in PAIRS else 1
    things = tuple(Thing(rng.choice(SIZES), rng.choice(visible), rng.choice(SHAPES)) for _ in range(count))
    return Scene(layout, background, things)


def held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the tenth of all scenes that no training ever sees."""
    return hashlib.sha256(repr(scene).encode()).digest()[0] < 26


def draw_scenes(count: int, seed: int, *, held: bool) -> list[Scene]:
    """`count` scenes from one side of the held-out split, the same for the same seed."""
    rng, scenes = random.Random(seed), []
    while len(scenes) < count:
        scene = random_scene(rng)
        if held_out(scene) == held:
            scenes.append(scene)
    return scenes


def _name(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _with_articles(text: str) -> str:
    return text.replace("a orange", "an orange")


def caption(scene: Scene, *, swapped: bool = False) -> str:
    """The caption that names every attribute; `swapped` names a pair's second thing first."""
    if scene.layout in PLACES:
        text = f"{_name(scene.things[0])} in the {scene.layout} of a {scene.background} background"
        return _with_articles(text)
    first, second = scene.things
    relation = {"horizontal": "left of", "vertical": "above"}[scene.layout]
    if swapped:
        first, second = second, first
        relation = {"horizontal": "right of", "vertical": "below"}[scene.layout]
    return _with_articles(f"{_name(first)} {relation} {_name(second)} on a {scene.background} background")


def partial_caption(scene: Scene, rng: random.Random) -> str:
    """A true caption that leaves some attributes open, down to a single word."""

    def phrase(thing: Thing) -> str:
        words = [word for word in (thing.size, thing.colour) if rng.random() < 0.6]
        return " ".join(["a", *words, thing.shape if rng.random() < 0.7 else "shape"])

    if rng.random() < 0.3:
        thing = rng.choice(scene.things)
        text = rng.choice((f"{scene.background} background", f"a {thing.shape}", phrase(thing), thing.colour))
        return _with_articles(text)
    text = " and ".join(phrase(thing) for thing in scene.things)
    if scene.layout in PLACES and rng.random() < 0.5:
        text += f" in the {scene.layout}"
    if rng.random() < 0.6:
        text += f" on a {scene.background} background"
    return _with_articles(text)


def training_caption(scene: Scene, rng: random.Random) -> str:
    """What the base model is trained with: three full captions for every partial one."""
    if rng.random() < 0.25:
        return partial_caption(scene, rng)
    return caption(scene, swapped=rng.random() < 0.5)


def _held_out_unwanted(unwanted: Description) -> bool:
    words = unwanted.attributes().values()
    in_tenth = hashlib.sha256(repr(unwanted).encode()).digest()[0] < 26
    return not set(words).isdisjoint(HELD_OUT_UNWANTED) or (len(words) > 1 and in_tenth)


def all_unwanted(*, held: bool) -> list[Description]:
    """What a negative prompt may name, from one side of a split: single attributes and combinations.

    Held out, for no training, are all that name a word of `HELD_OUT_UNWANTED`, and a tenth of the other combinations.
    """
    every = itertools.product((None, *SIZES), (None, *COLOURS), (None, *SHAPES))
    return [d for d in itertools.starmap(Description, every) if d.attributes() and _held_out_unwanted(d) == held]


def training_negatives() -> list[str]:
    """Half of them empty, half what the held-out side of the split does not name."""
    named = [unwanted.text() for unwanted in all_unwanted(held=False)]
    return [""] * len(named) + named


def open_caption(rng: random.Random) -> tuple[str, Description]:
    """A caption of one thing that leaves at least one of its attributes open, and what it says of the thing."""
    thing = Thing(rng.choice(SIZES), rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
    kept = rng.choice([(), (), ("size",), ("colour",), ("shape",), ("size", "colour"), ("size", "shape")])
    described = Description(**{name: getattr(thing, name) for name in kept})
    background = rng.choice([colour for colour in COLOURS if colour != described.colour])
    return _with_articles(f"{described.text()} on a {background} background"), described


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to a shape of radius 1, negative inside; `y` points down."""
    radius = torch.hypot(x, y)
    if shape == "circle":
        return radius - 0.95
    if shape == "ring":
        return (radius - 0.75).abs() - 0.25
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.82
    if shape == "cross":
        long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(long - 1.0, short - 0.3)
    points, inner = {"triangle": (3, 0.5), "star": (5, 0.40)}[shape]
    # Fold the plane into one wedge, in which the outline is the straight line from a tip to an inner corner.
    wedge = math.pi / points
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + wedge, 2 * wedge) - wedge).abs()
    u, v = radius * folded.cos(), radius * folded.sin()
    corner_u, corner_v = inner * math.cos(wedge), inner * math.sin(wedge)
    length = math.hypot(1 - corner_u, corner_v)
    grow = 1.15 if shape == "triangle" else 1.1
    return ((u - grow) * corner_v + v * (grow - grow * corner_u)) / (grow * length)


def _places(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    def near(value: float) -> float:
        return value + rng.uniform(-0.03, 0.03)

    if scene.layout == "horizontal":
        return [(near(0.26), near(0.5)), (near(0.74), near(0.5))]
    if scene.layout == "vertical":
        return [(near(0.5), near(0.26)), (near(0.5), near(0.74))]
    x = 0.27 if "left" in scene.layout else 0.73 if "right" in scene.layout else 0.5
    y = 0.27 if "top" in scene.layout else 0.73 if "bottom" in scene.layout else 0.5
    return [(near(x), near(y))]


def render(scenes: list[Scene], seed: int, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Pictures of `scenes`: (n, 3, size, size) in [0, 1]. Place, radius and tint vary a little with the seed."""
    rng = random.Random(seed)
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def tint(colour: str) -> torch.Tensor:
        return torch.tensor([min(1.0, max(0.0, v / 255 + rng.uniform(-0.03, 0.03))) for v in COLOURS[colour]])

    images = []
    for scene in scenes:
        angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.12)
        shade = slope * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle))
        image = tint(scene.background)[:, None, None] + shade
        for thing, (cx, cy) in zip(scene.things, _places(scene, rng), strict=True):
            radius = rng.uniform(0.125, 0.14) if thing.size == "small" else rng.uniform(0.195, 0.215)
            distance = _distance(thing.shape, (x - cx) / radius, (y - cy) / radius) * radius * size
            cover = (0.5 - distance).clamp(0, 1)  # one pixel of anti-aliasing
            image = image + cover * (tint(thing.colour)[:, None, None] - image)
        images.append(image.clamp(0, 1))
    return torch.stack(images)
