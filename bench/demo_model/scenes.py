"""The scenes that the demo model draws: one or two flat shapes on a plain background.

Random scenes, their pixels with anti-aliased edges, and captions in varied words.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 48),
    "orange": (244, 138, 28),
    "yellow": (250, 218, 66),
    "green": (44, 160, 84),
    "blue": (38, 96, 212),
    "purple": (132, 62, 176),
    "white": (246, 246, 244),
    "black": (28, 28, 34),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
# Each relation of the first object to the second, and its inverse.
RELATIONS = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}

PLACE_CENTRES = {
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.73),
    "centre": (0.5, 0.5),
}
_RELATION_CENTRES = {
    "left of": ((0.27, 0.5), (0.73, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "right of": ((0.73, 0.5), (0.27, 0.5)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
}
# Radius of a circle as a share of the shorter side, alone in the scene and as one of two.
RADIUS_ALONE = {"small": 0.115, "large": 0.185}
RADIUS_PAIRED = {"small": 0.11, "large": 0.17}
# Corner radius of each polygon over the radius of a circle that looks as large.
CORNER_SCALE = {"square": 1.24, "triangle": 1.3, "star": 1.32}
STAR_INNER = 0.46
_SUPERSAMPLING = 8
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Thing:
    """One object; its centre in shares of the width and the height."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    rgb: RGB | None = None


@dataclass(frozen=True)
class Scene:
    """What is rendered. One object has a `place`; two have a `relation`, first to second."""

    width: int
    height: int
    background: str
    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None
    background_rgb: RGB | None = None

    @property
    def key(self) -> str:
        """A description of the scene without its small random variations."""
        things = " ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in self.things)
        return f"{things} {self.place or self.relation} {self.background}"


def is_held_out(scene: Scene) -> bool:
    """Whether this combination is kept for evaluation; a tenth is, the same in every run."""
    return zlib.crc32(scene.key.encode()) % 1000 < _HELD_OUT_SHARE * 1000


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    objects: int | None = None,
    held_out: bool = False,
) -> Scene:
    """A random scene of one or two objects, from the training or the held-out combinations."""
    while True:
        count = objects if objects is not None else (1 if rng.random() < 0.5 else 2)
        scene = (_single if count == 1 else _pair)(rng, width, height)
        if is_held_out(scene) == held_out:
            return scene


def _single(rng: np.random.Generator, width: int, height: int) -> Scene:
    background, colour = _different_colours(rng, 2)
    place = _choose(rng, PLACES)
    thing = _thing(rng, PLACE_CENTRES[place], colour, RADIUS_ALONE)
    return Scene(
        width, height, background, (thing,), place=place, background_rgb=_tint(rng, background)
    )


def _pair(rng: np.random.Generator, width: int, height: int) -> Scene:
    background, first, second = _different_colours(rng, 3)
    if rng.random() < 0.1:
        second = first
    relation = _choose(rng, tuple(RELATIONS))
    centres = _RELATION_CENTRES[relation]
    things = (
        _thing(rng, centres[0], first, RADIUS_PAIRED),
        _thing(rng, centres[1], second, RADIUS_PAIRED),
    )
    return Scene(
        width, height, background, things, relation=relation, background_rgb=_tint(rng, background)
    )


def _thing(
    rng: np.random.Generator, centre: tuple[float, float], colour: str, radii: dict[str, float]
) -> Thing:
    size = _choose(rng, SIZES)
    return Thing(
        shape=_choose(rng, SHAPES),
        colour=colour,
        size=size,
        x=centre[0] + rng.uniform(-0.015, 0.015),
        y=centre[1] + rng.uniform(-0.015, 0.015),
        radius=radii[size] * rng.uniform(0.95, 1.05),
        angle=rng.uniform(-8.0, 8.0),
        rgb=_tint(rng, colour),
    )


def _different_colours(rng: np.random.Generator, count: int) -> tuple[str, ...]:
    names = tuple(COLOURS)
    return tuple(names[int(i)] for i in rng.permutation(len(names))[:count])


def _tint(rng: np.random.Generator, colour: str) -> RGB:
    """The colour with a random change of a few levels, too small to become another colour."""
    shift = rng.integers(-4, 5)
    red, green, blue = (
        int(np.clip(level + shift + rng.integers(-2, 3), 0, 255)) for level in COLOURS[colour]
    )
    return red, green, blue


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def render(scene: Scene) -> Pixels:
    """The scene as (height, width, 3) bytes, edges anti-aliased."""
    background = scene.background_rgb or COLOURS[scene.background]
    image = Image.new("RGB", (scene.width, scene.height), background)
    for thing in scene.things:
        _paint(image, thing)
    return np.asarray(image)


def _paint(image: Image.Image, thing: Thing) -> None:
    scale = _SUPERSAMPLING
    unit = min(image.size)
    x, y = thing.x * image.width, thing.y * image.height
    reach = thing.radius * unit * max(CORNER_SCALE.values()) + 2
    left, top = math.floor(x - reach), math.floor(y - reach)
    side = math.ceil(2 * reach) + 1
    mask = Image.new("L", (side * scale, side * scale), 0)
    outline = [((px - left) * scale, (py - top) * scale) for px, py in _outline(thing, x, y, unit)]
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    image.paste(thing.rgb or COLOURS[thing.colour], (left, top), mask.reduce(scale))


def _outline(thing: Thing, x: float, y: float, unit: int) -> list[tuple[float, float]]:
    radius = thing.radius * unit
    if thing.shape == "circle":
        corners = [(radius, 360.0 * i / 72) for i in range(72)]
    else:
        outer = radius * CORNER_SCALE[thing.shape]
        if thing.shape == "star":
            corners = [(outer if i % 2 == 0 else outer * STAR_INNER, 36.0 * i) for i in range(10)]
        else:
            sides, start = {"square": (4, 45.0), "triangle": (3, 0.0)}[thing.shape]
            corners = [(outer, start + 360.0 * i / sides) for i in range(sides)]
    points = []
    for distance, degrees in corners:
        turn = math.radians(degrees + thing.angle - 90.0)
        points.append((x + distance * math.cos(turn), y + distance * math.sin(turn)))
    return points


# --- words -----------------------------------------------------------------------------------

_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
_PLACE_WORDS = {
    "left": ("on the left", "at the left", "to the left", "on the left side", "left"),
    "right": ("on the right", "at the right", "to the right", "on the right side", "right"),
    "top": ("at the top", "on top", "near the top", "top"),
    "bottom": ("at the bottom", "near the bottom", "bottom"),
    "centre": ("in the centre", "in the center", "in the middle", "centre", "center", "middle"),
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
_OPENINGS = (
    "a picture of",
    "a drawing of",
    "an image of",
    "a simple painting of",
    "there is",
    "show me",
    "draw",
)
# Words without a meaning for the scene; the model learns to ignore them.
_FILLERS = (
    "nice",
    "beautiful",
    "simple",
    "flat",
    "bright",
    "photo",
    "art",
    "one",
    "single",
    "shape",
    "please",
    "and",
    "cat",
    "dog",
    "house",
    "tree",
    "car",
    "person",
    "sky",
    "high",
    "quality",
    "detailed",
    "masterpiece",
    "style",
)


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A complete caption: background, sizes, colours, shapes, and place or relation."""
    return _caption(scene, rng, keep=1.0)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as people write it: often without articles, sizes or place, rarely one word."""
    roll = rng.random()
    if roll < 0.55:
        return _caption(scene, rng, keep=1.0)
    if roll < 0.9:
        return _caption(scene, rng, keep=0.6)
    if roll < 0.96:
        return _fragment(scene, rng)
    return _with_noise(_caption(scene, rng, keep=0.7), rng)


def _caption(scene: Scene, rng: np.random.Generator, *, keep: float) -> str:
    def kept() -> bool:
        return bool(rng.random() < keep)

    articles = bool(rng.random() < 0.7)
    nouns = [_noun(thing, rng, articles=articles, size=kept()) for thing in scene.things]
    where = kept()
    if len(nouns) == 1:
        subject = nouns[0]
        if where:
            place = _choose(rng, _PLACE_WORDS[scene.place or "centre"])
            subject += (", " if rng.random() < 0.15 else " ") + place
    elif where:
        subject = _related(nouns, scene.relation or "left of", rng)
    else:
        subject = f"{nouns[0]} and {nouns[1]}"
    if kept():
        subject = _on_background(subject, scene.background, rng, articles=articles)
    return f"{_choose(rng, _OPENINGS)} {subject}" if rng.random() < 0.15 else subject


def _noun(thing: Thing, rng: np.random.Generator, *, articles: bool, size: bool) -> str:
    words = [thing.colour, thing.shape]
    if size:
        words.insert(0, _choose(rng, _SIZE_WORDS[thing.size]))
    if articles:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)


def _related(nouns: list[str], relation: str, rng: np.random.Generator) -> str:
    first, second = nouns
    if rng.random() < 0.4:
        first, second, relation = second, first, RELATIONS[relation]
    if rng.random() < 0.15:
        sides = {
            "left of": ("left", "right"),
            "right of": ("right", "left"),
            "above": ("top", "bottom"),
            "below": ("bottom", "top"),
        }
        here, there = (_choose(rng, _PLACE_WORDS[side]) for side in sides[relation])
        return f"{first} {here} and {second} {there}"
    return f"{first} {_choose(rng, _RELATION_WORDS[relation])} {second}"


def _on_background(subject: str, colour: str, rng: np.random.Generator, *, articles: bool) -> str:
    article = ("an " if colour[0] in "aeiou" else "a ") if articles else ""
    roll = rng.random()
    if roll < 0.6:
        return f"{subject} on {article}{colour} background"
    if roll < 0.75:
        return f"{subject}, {colour} background"
    if roll < 0.85:
        return f"{subject} on {colour}"
    if roll < 0.93:
        return f"{article}{colour} background with {subject}"
    return f"on {article}{colour} background, {subject}"


def _fragment(scene: Scene, rng: np.random.Generator) -> str:
    thing = scene.things[int(rng.integers(len(scene.things)))]
    options = [
        thing.shape,
        thing.colour,
        f"{thing.colour} {thing.shape}",
        f"{scene.background} background",
        f"{thing.size} {thing.shape}",
    ]
    if scene.place:
        options.append(f"{thing.shape} {_choose(rng, _PLACE_WORDS[scene.place])}")
    return _choose(rng, tuple(options))


def _with_noise(text: str, rng: np.random.Generator) -> str:
    """The caption with meaningless words added, or meaningless words alone."""
    words = [] if rng.random() < 0.4 else text.split()
    for _ in range(int(rng.integers(1, 6))):
        if rng.random() < 0.5:
            word = _choose(rng, _FILLERS)
        else:
            letters = rng.integers(ord("a"), ord("z") + 1, size=int(rng.integers(2, 9)))
            word = "".join(chr(int(code)) for code in letters)
        words.insert(int(rng.integers(len(words) + 1)), word)
    return " ".join(words)


def vocabulary() -> tuple[str, ...]:
    """Every word that captions use, sorted; each is one token of the tokenizer."""
    return tuple(sorted({word for text in _phrases() for word in text.replace(",", " ").split()}))


def meaningful_words() -> tuple[str, ...]:
    """The words that change the picture."""
    words = {word for text in _meanings() for word in text.split()}
    return tuple(sorted(words - {"a", "at", "in", "near", "of", "on", "the", "to", "side"}))


def words_by_kind() -> dict[str, str]:
    """The meaningful words by category, for users; synonyms are separated by slashes."""
    places = ([w for w in words if " " not in w] for words in _PLACE_WORDS.values())
    relations = ([w for w in words if " the " not in w] for words in _RELATION_WORDS.values())
    return {
        "Colours": ", ".join(COLOURS),
        "Shapes": ", ".join(SHAPES),
        "Sizes": ", ".join("/".join(dict.fromkeys(words)) for words in _SIZE_WORDS.values()),
        "Places": ", ".join("/".join(words) for words in places),
        "Relations": ", ".join("/".join(words) for words in relations),
    }


def _meanings() -> Iterator[str]:
    yield from COLOURS
    yield from SHAPES
    for table in (_SIZE_WORDS, _PLACE_WORDS, _RELATION_WORDS):
        for phrases in table.values():
            yield from phrases
    yield "background"


def _phrases() -> Iterator[str]:
    yield from _meanings()
    yield from _OPENINGS
    yield from _FILLERS
    yield from ("a", "an", "and", "on", "with")
