"""Draw `flowers/`, the small example set: six kinds of flowers that differ in shape and share their colours.

Every picture is a function of its class, split and number alone, so running this again writes the same files. The
folder names sort differently as text ("10" before "2") than as numbers, and `cat_to_name.json` says what each shows.

    python data_examples/draw_flowers.py [OUTPUT]
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

IMAGES_PER_CLASS = {"train": 24, "valid": 10}
SUPERSAMPLING = 2
SPRITE_PX = 280
JPEG = {"quality": 80, "progressive": True}
UP = -math.pi / 2  # y runs down, as in images
SHADOW_REACH = 0.07  # in sprite units, as all sizes on a sprite
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))

Array = npt.NDArray[np.float64]
Colour = tuple[float, float, float]
Point = tuple[float, float]
Random = np.random.Generator
Choice = TypeVar("Choice")

WHITE, CREAM, YELLOW, ORANGE = (0.97, 0.96, 0.95), (0.98, 0.91, 0.70), (0.98, 0.83, 0.12), (0.97, 0.52, 0.08)
RED, PINK, VIOLET, BLUE = (0.82, 0.09, 0.13), (0.94, 0.50, 0.66), (0.58, 0.32, 0.76), (0.36, 0.42, 0.86)
LEAF, STRAW, BROWN, BLACK = (0.27, 0.48, 0.16), (0.88, 0.78, 0.30), (0.30, 0.17, 0.08), (0.0, 0.0, 0.0)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return `first` with a `share` of 0..1 of `second`."""
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return red, green, blue


def oval(widest: float, point: float) -> Callable[[Array], Array]:
    """Return an outline from base 0 to tip 1, widest at `widest`; the larger `point`, the sharper the tip."""
    power = math.log(0.5) / math.log(widest)
    return lambda along: np.sin(math.pi * along**power).clip(0) ** point


def bell(along: Array) -> Array:
    """Return the outline of a hanging bell: a round crown, straight sides and a flared lip."""
    return 0.72 * np.sqrt(1 - (1 - (along / 0.35).clip(0, 1)) ** 2) + 0.28 * along**4


def pick(random: Random, choices: Sequence[Choice]) -> Choice:
    """Return one of the choices."""
    return choices[int(random.integers(len(choices)))]


@dataclass(frozen=True)
class Shape:
    """The form of a petal, leaf or bell in sprite units; `bend` is how far its tip strays to the side."""

    length: float
    width: float
    outline: Callable[[Array], Array]
    bend: float = 0.0


@dataclass(frozen=True)
class Paint:
    """The colours of a petal from base to tip, how early the base's fades and how deep the midrib and veins are."""

    base: Colour
    tip: Colour
    fade: float = 1.0
    rib: float = 0.12


class Sprite:
    """A transparent square, x right and y down from -1 to 1, on which shapes are painted with soft shadows."""

    def __init__(self) -> None:
        axis = np.linspace(-1, 1, SPRITE_PX)
        self.x, self.y = np.meshgrid(axis, axis)
        self.premultiplied = np.zeros((SPRITE_PX, SPRITE_PX, 3))
        self.alpha = np.zeros((SPRITE_PX, SPRITE_PX, 1))

    def _window(self, at: Point, reach: float) -> tuple[slice, slice]:
        """Return the rows and columns that a shape within `reach` of a point can change, its shadow included."""
        first, last = (
            [int((value + sign * (reach + SHADOW_REACH) + 1) / 2 * SPRITE_PX) for value in reversed(at)]
            for sign in (-1, 1)
        )
        return slice(max(first[0], 0), max(last[0], 0)), slice(max(first[1], 0), max(last[1], 0))

    def _paint(self, window: tuple[slice, slice], depth: Array, colour: Array, shadow: float = 0.35) -> None:
        """Lay `colour` where `depth`, the distance inwards from the shape's edge, is positive; shade what is below."""
        mask = (depth * SPRITE_PX / 2 + 0.5).clip(0, 1)[..., None]
        below = self.premultiplied[window] * (1 - shadow * (1 + depth / SHADOW_REACH).clip(0, 1)[..., None])
        self.premultiplied[window] = below * (1 - mask) + colour.clip(0, 1) * mask
        self.alpha[window] = self.alpha[window] * (1 - mask) + mask

    def petal(self, angle: float, shape: Shape, paint: Paint, at: Point = (0.0, 0.0)) -> None:
        """Paint a petal that grows from `at`: one side is lit, and veins follow its length."""
        cos, sin = math.cos(angle), math.sin(angle)
        window = self._window(polar(angle, shape.length / 2, at), shape.length / 2 + shape.width + abs(shape.bend))
        dx, dy = self.x[window] - at[0], self.y[window] - at[1]
        along = (dx * cos + dy * sin) / shape.length
        inside = along.clip(0, 1)
        across = dy * cos - dx * sin - shape.bend * inside**2
        half_width = shape.width * shape.outline(inside)
        depth = half_width - np.abs(across) - np.abs(along - inside) * shape.length
        side = (across / np.maximum(half_width, 1e-6)).clip(-1, 1)
        light = 1 + 0.10 * side - 0.14 * side**4
        light += paint.rib * (0.3 * np.cos(side * 22) * inside - np.exp(-((side * 7) ** 2)) * (1 - 0.6 * inside))
        share = (inside**paint.fade)[..., None]
        colour = np.asarray(paint.base) * (1 - share) + np.asarray(paint.tip) * share
        self._paint(window, depth, colour * light[..., None])

    def dome(self, at: Point, radius: float, colour: Colour, *, seeds: float = 0.0, shadow: float = 0.35) -> None:
        """Paint a round dome lit from the upper left; `seeds` of 0..1 is how deep a spiral seed pattern is cut."""
        window = self._window(at, radius)
        dx, dy = (self.x[window] - at[0]) / radius, (self.y[window] - at[1]) / radius
        distance, theta = np.hypot(dx, dy), np.arctan2(dy, dx)
        light = 1.08 - 0.25 * distance**2 - 0.18 * (dx + dy)
        light += seeds * np.cos(13 * theta + 17 * distance) * np.cos(21 * theta - 25 * distance) * (0.4 + distance)
        self._paint(window, (1 - distance) * radius, np.asarray(colour) * light[..., None], shadow)

    def thread(self, points: list[Point], radius: float, colour: Colour) -> None:
        """Paint a thin stalk along the quadratic curve with these three control points."""
        (left, top), (right, bottom) = np.min(points, axis=0), np.max(points, axis=0)
        window = self._window(((left + right) / 2, (top + bottom) / 2), max(right - left, bottom - top) / 2 + radius)
        distance = np.full(self.x[window].shape, np.inf)
        corners = [curve_point(points, share) for share in np.linspace(0, 1, 16)]
        for (x, y), (next_x, next_y) in pairwise(corners):
            dx, dy = self.x[window] - x, self.y[window] - y
            step_x, step_y = next_x - x, next_y - y
            along = ((dx * step_x + dy * step_y) / (step_x**2 + step_y**2)).clip(0, 1)
            distance = np.minimum(distance, np.hypot(dx - along * step_x, dy - along * step_y))
        light = 1.2 - 0.5 * (distance / radius)[..., None]
        self._paint(window, radius - distance, np.asarray(colour) * light)

    def image(self) -> Image.Image:
        """Return the sprite as an RGBA image."""
        colour = self.premultiplied / np.maximum(self.alpha, 1e-6)
        return Image.fromarray((np.concatenate([colour, self.alpha], axis=2) * 255).round().astype(np.uint8))


def polar(angle: float, distance: float, origin: Point = (0.0, 0.0)) -> Point:
    """Return the point at `distance` from `origin` in the direction of `angle`."""
    return origin[0] + distance * math.cos(angle), origin[1] + distance * math.sin(angle)


def curve_point(points: list[Point], share: float) -> Point:
    """Return the point at `share` of the quadratic Bézier curve with three control points."""
    (x0, y0), (x1, y1), (x2, y2) = points
    rest = 1 - share
    return (
        rest * rest * x0 + 2 * rest * share * x1 + share * share * x2,
        rest * rest * y0 + 2 * rest * share * y1 + share * share * y2,
    )


def draw_ray_petals(sprite: Sprite, random: Random, colour: Colour, *, rings: int, width: float, point: float) -> None:
    """Draw rings of narrow petals around the centre, each ring a little shorter than the one below it."""
    count = int(random.integers(14, 21))
    outline = oval(0.62, point)
    for ring in range(rings):
        for number in range(count):
            angle = math.tau * (number + ring / rings) / count + random.normal(0, 0.035)
            length = (0.98 - 0.11 * ring) * random.uniform(0.92, 1)
            shade = random.uniform(0.0, 0.12)
            paint = Paint(mix(colour, BLACK, 0.3 + shade), mix(colour, BLACK, shade), fade=0.6)
            sprite.petal(angle, Shape(length, width, outline, bend=random.normal(0, 0.035)), paint)


def draw_daisy(sprite: Sprite, random: Random, colour: Colour) -> None:
    """Draw many thin round-ended petals around a small disc."""
    draw_ray_petals(sprite, random, colour, rings=int(random.integers(1, 3)), width=0.115, point=0.4)
    disc = pick(random, [YELLOW, STRAW, mix(YELLOW, LEAF, 0.5), mix(ORANGE, BROWN, 0.5)])
    sprite.dome((0, 0), random.uniform(0.20, 0.27), disc, seeds=0.22)


def draw_sunflower(sprite: Sprite, random: Random, colour: Colour) -> None:
    """Draw overlapping pointed petals around a large disc of seeds."""
    draw_ray_petals(sprite, random, colour, rings=3, width=0.14, point=0.95)
    disc = pick(random, [BROWN, mix(BROWN, BLACK, 0.4), mix(BROWN, YELLOW, 0.3), mix(LEAF, BROWN, 0.5)])
    radius = random.uniform(0.40, 0.50)
    sprite.dome((0, 0), radius, mix(disc, STRAW, 0.25), seeds=0.5)
    sprite.dome((0, 0), radius * 0.62, mix(disc, BLACK, 0.25), seeds=0.5)
    sprite.dome((0, 0), radius * 0.28, mix(disc, LEAF, 0.5), seeds=0.4)


def draw_fire_lily(sprite: Sprite, random: Random, colour: Colour) -> None:
    """Draw a star of six pointed petals with freckles, and long stamens with dark anthers."""
    turn = random.uniform(0, math.tau)
    throat = mix(pick(random, [YELLOW, LEAF, BROWN, WHITE]), colour, 0.3)
    for number in (0, 2, 4, 1, 3, 5):
        angle = turn + math.tau * number / 6 + random.normal(0, 0.05)
        outline = oval(random.uniform(0.42, 0.5), 0.85)
        width = 0.21 if number % 2 else 0.27
        shape = Shape(random.uniform(0.9, 1.0), width, outline, bend=random.normal(0, 0.1))
        sprite.petal(angle, shape, Paint(throat, colour, fade=0.8, rib=0.22))
        for _ in range(int(random.integers(4, 14))):
            freckle = polar(angle - UP, random.uniform(-0.09, 0.09), polar(angle, random.uniform(0.2, 0.5)))
            sprite.dome(freckle, 0.016, mix(colour, BROWN, 0.75), shadow=0.05)
    for number in range(6):
        angle = turn + math.tau * (number + 0.5) / 6 + random.normal(0, 0.15)
        end = polar(angle, random.uniform(0.45, 0.6))
        sprite.thread([(0, 0), polar(angle + 0.4, 0.3), end], 0.017, mix(CREAM, colour, 0.25))
        anther = Shape(0.16, 0.034, oval(0.5, 0.5))
        sprite.petal(angle - UP, anther, Paint(BROWN, mix(BROWN, ORANGE, 0.4)), polar(angle + UP, 0.08, end))


def draw_rose(sprite: Sprite, random: Random, colour: Colour) -> None:
    """Draw rings of broad petals with pale rims, ever closer around a spiral heart."""
    turn = random.uniform(0, math.tau)
    for radius, count in ((0.97, 5), (0.86, 5), (0.70, 5), (0.56, 4), (0.43, 4), (0.32, 3), (0.23, 3)):
        turn += GOLDEN_ANGLE
        for number in range(count):
            angle = turn + math.tau * number / count + random.normal(0, 0.12)
            width = 2.7 / count * radius * random.uniform(0.95, 1.15)
            outline = oval(random.uniform(0.68, 0.74), random.uniform(0.38, 0.5))
            shape = Shape(radius * random.uniform(0.88, 1.02), width, outline, bend=random.normal(0, 0.1) * radius)
            rim = mix(colour, WHITE, random.uniform(0.12, 0.34))
            sprite.petal(angle, shape, Paint(mix(colour, BLACK, 0.5), rim, fade=2.2, rib=0))
    for step in range(12):
        at = polar(turn + step * 0.9, 0.10 * (1 - step / 12))
        sprite.dome(at, 0.075 - 0.003 * step, mix(colour, BLACK, 0.1 + 0.15 * (step % 3)))


def draw_tulip(sprite: Sprite, random: Random, colour: Colour) -> None:
    """Draw an upright cup of five pointed petals, seen from the side."""
    opening = random.uniform(0.12, 0.34)
    base = mix(colour, pick(random, [YELLOW, LEAF, WHITE, BLACK]), 0.45)
    edge = mix(colour, pick(random, [YELLOW, WHITE, RED, colour]), 0.3)
    outline = oval(random.uniform(0.40, 0.48), 0.62)
    front = random.uniform(-0.2, 0.2)
    for lean, length, width, shade in (
        (0.45, 1.62, 0.36, 0.35),
        (-0.45, 1.62, 0.36, 0.35),
        (1.0, 1.66, 0.40, 0.18),
        (-1.0, 1.66, 0.40, 0.18),
        (front, 1.48, 0.50, 0.0),
    ):
        angle = UP + lean * opening + random.normal(0, 0.02)
        shape = Shape(length * random.uniform(0.95, 1), width, outline, bend=random.normal(0, 0.02) - 0.22 * lean)
        sprite.petal(angle, shape, Paint(mix(base, BLACK, shade), mix(edge, BLACK, shade), fade=0.7), at=(0, 0.85))


def draw_bluebell(sprite: Sprite, random: Random, colour: Colour) -> None:
    """Draw an arching stalk from which bells with curled lips hang."""
    side = pick(random, [-1, 1])
    arch = [(0.0, 1.0), (-0.4 * side, -0.75), (random.uniform(0.35, 0.6) * side, -0.85)]
    green = mix(LEAF, colour, 0.2)
    sprite.thread(arch, 0.035, green)
    count = int(random.integers(5, 8))
    paint = Paint(mix(colour, BLACK, 0.22), mix(colour, WHITE, 0.15), fade=0.7, rib=0.2)
    for number in range(count):
        share = 1 - 0.62 * number / count
        size = 0.30 + 0.35 * (1 - share) + random.normal(0, 0.02)
        hang = -UP + random.normal(0, 0.12) - 0.3 * side * (1 if number % 2 else -1)
        start = curve_point(arch, share)
        crown = polar(hang, 0.14, start)
        sprite.thread([start, (start[0], start[1] - 0.03), crown], 0.02, green)
        lip = polar(hang, 0.93 * size, crown)
        for lean in (-1.15, 1.15, -0.45, 0.45, 0.0):
            sprite.petal(hang + lean, Shape(0.19, 0.075, oval(0.5, 0.7)), paint, polar(hang - UP, 0.12 * lean, lip))
        sprite.petal(hang, Shape(size, 0.17, bell), paint, crown)


@dataclass(frozen=True)
class Kind:
    """A class of the set: the name shown, how it is drawn, the colours it comes in and whether it stands upright."""

    display_name: str
    draw: Callable[[Sprite, Random, Colour], None]
    colours: tuple[Colour, ...]
    is_upright: bool = False


KINDS = {
    "1": Kind("daisy", draw_daisy, (WHITE, YELLOW, ORANGE, RED, PINK, VIOLET)),
    "2": Kind("tulip", draw_tulip, (WHITE, YELLOW, ORANGE, RED, PINK, VIOLET), is_upright=True),
    "3": Kind("bluebell", draw_bluebell, (BLUE, VIOLET, PINK, WHITE, YELLOW), is_upright=True),
    "10": Kind("garden rose", draw_rose, (WHITE, CREAM, YELLOW, ORANGE, RED, PINK, VIOLET)),
    "21": Kind("fire lily", draw_fire_lily, (WHITE, YELLOW, ORANGE, RED, PINK)),
    "100": Kind("sunflower", draw_sunflower, (YELLOW, YELLOW, ORANGE, RED, CREAM, PINK)),
}


def clouds(random: Random, size: tuple[int, int], colours: tuple[Colour, Colour], cells: int) -> Image.Image:
    """Return a picture of `size` that wanders smoothly between two colours, about `cells` times across."""
    shares = random.random((cells + 1, cells + 1, 1))
    grid = np.asarray(colours[0]) * (1 - shares) + np.asarray(colours[1]) * shares
    return Image.fromarray((grid * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def pixels(colour: Colour) -> tuple[int, int, int]:
    """Return a colour of 0..1 as 8-bit values."""
    red, green, blue = (round(255 * min(max(value, 0), 1)) for value in colour)
    return red, green, blue


def scatter(image: Image.Image, random: Random, colours: list[Colour], *, count: int, share: float) -> None:
    """Scatter `count` round or oval patches, up to `share` of the picture's width across."""
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        x, y = random.uniform(0, image.width), random.uniform(0, image.height)
        width, height = random.uniform(0.3, 1, 2) * share * image.width / 2
        colour = mix(pick(random, colours), BLACK, random.uniform(0, 0.35))
        draw.ellipse((x - width, y - height, x + width, y + height), fill=pixels(colour))


def draw_grass(image: Image.Image, random: Random, *, count: int) -> None:
    """Draw blades of grass that grow from the lower edge."""
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        x, height = random.uniform(-0.1, 1.1) * image.width, random.uniform(0.3, 1.0) * image.height
        lean, width = random.normal(0, 0.18) * image.width, random.uniform(0.006, 0.018) * image.width
        foot = image.height * 1.02
        colour = mix(mix(LEAF, STRAW, random.uniform(0, 0.4)), BLACK, random.uniform(0, 0.4))
        draw.polygon([(x - width, foot), (x + lean, foot - height), (x + width, foot)], fill=pixels(colour))


def draw_background(random: Random, size: tuple[int, int]) -> Image.Image:
    """Draw one of five places: meadow, sky, soil, lights out of focus, or foliage."""
    place = int(random.integers(5))
    petals = [WHITE, YELLOW, ORANGE, RED, PINK, VIOLET, BLUE]
    blur = 2.0
    if place == 0:
        image = clouds(random, size, (mix(LEAF, STRAW, 0.3), mix(LEAF, BLACK, 0.3)), 4)
        draw_grass(image, random, count=90)
        scatter(image, random, petals, count=int(random.integers(0, 14)), share=0.09)
        blur = random.uniform(2, 7)
    elif place == 1:
        top = pick(random, [BLUE, (0.35, 0.62, 0.90), (0.55, 0.70, 0.85), (0.93, 0.62, 0.50)])
        image = clouds(random, size, (top, mix(top, WHITE, random.uniform(0.4, 0.9))), int(random.integers(3, 6)))
        blur = 4.0
    elif place == 2:
        image = clouds(random, size, (BROWN, mix(BROWN, CREAM, random.uniform(0.2, 0.6))), 9)
        scatter(image, random, [BROWN, mix(BROWN, STRAW, 0.5), (0.55, 0.53, 0.50)], count=120, share=0.05)
        blur = random.uniform(1.5, 4)
    elif place == 3:
        dark = mix(pick(random, petals), BLACK, random.uniform(0.3, 0.85))
        image = clouds(random, size, (dark, mix(dark, LEAF, 0.5)), 3)
        scatter(image, random, [mix(dark, colour, 0.5) for colour in (*petals, LEAF, STRAW)], count=26, share=0.22)
        blur = random.uniform(5, 10)
    else:
        image = clouds(random, size, (mix(LEAF, BLACK, 0.75), mix(LEAF, BLACK, 0.45)), 5)
        for _ in range(int(random.integers(8, 15))):
            at = (random.uniform(0, size[0]), random.uniform(0, size[1]))
            place_sprite(image, draw_leaf(random), at, scale=random.uniform(0.5, 0.9), turn=random.uniform(0, 360))
        blur = random.uniform(1, 4)
    return image.filter(ImageFilter.GaussianBlur(blur * SUPERSAMPLING))


def draw_leaf(random: Random) -> Image.Image:
    """Draw one upright leaf that grows from the lower edge of its sprite."""
    green = mix(mix(LEAF, STRAW, random.uniform(0, 0.3)), BLACK, random.uniform(0, 0.45))
    outline = oval(random.uniform(0.35, 0.5), random.uniform(0.8, 1.1))
    width, bend = random.uniform(0.16, 0.42), random.normal(0, 0.15)
    paint = Paint(mix(green, BLACK, 0.3), mix(green, STRAW, 0.15), rib=0.35)
    sprite = Sprite()
    sprite.petal(UP, Shape(1.9, width, outline, bend), paint, at=(0, 1.0))
    return sprite.image()


def place_sprite(
    scene: Image.Image,
    sprite: Image.Image,
    at: Point,
    *,
    scale: float,
    turn: float = 0,
    squash: float = 1,
    blur: float = 0,
) -> None:
    """Lay a sprite on the scene: `scale` of the scene's short side, foreshortened by `squash`, `turn` in degrees."""
    side = max(round(scale * min(scene.size)), 8)
    sprite = sprite.resize((side, max(round(side * squash), 8)), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(turn, Image.Resampling.BICUBIC, expand=True)
    sprite = sprite.filter(ImageFilter.GaussianBlur(blur)) if blur else sprite
    corner = round(at[0] - sprite.width / 2), round(at[1] - sprite.height / 2)
    shadow = (
        sprite.getchannel("A")
        .filter(ImageFilter.GaussianBlur(side / 30))
        .point([value * 2 // 5 for value in range(256)])
    )
    scene.paste((0, 0, 0), (corner[0] + side // 40, corner[1] + side // 25), shadow)
    scene.paste(sprite, corner, sprite)


def draw_stem(scene: Image.Image, random: Random, start: Point, *, scale: float) -> None:
    """Draw a stem from `start` down and out of the picture, with a lit side and two leaves."""
    width = max(0.035 * scale * min(scene.size), 3)
    foot = (start[0] + random.normal(0, 0.12) * scene.width, scene.height * 1.05)
    bow = (start[0] + random.normal(0, 0.04) * scene.width, (start[1] + foot[1]) / 2)
    points = [curve_point([start, bow, foot], share) for share in np.linspace(0, 1, 24)]
    green = mix(mix(LEAF, STRAW, random.uniform(0, 0.25)), BLACK, random.uniform(0.05, 0.3))
    draw = ImageDraw.Draw(scene)
    draw.line(points, fill=pixels(mix(green, BLACK, 0.3)), width=round(width), joint="curve")
    lit = [(x - width / 5, y) for x, y in points]
    draw.line(lit, fill=pixels(mix(green, STRAW, 0.2)), width=max(round(width / 2), 1), joint="curve")
    for side in (-1, 1):
        x, y = points[int(random.integers(9, 20))]
        turn = side * random.uniform(25, 60)
        size = scale * random.uniform(0.5, 0.8) * min(scene.size) / 2
        at = polar(UP - math.radians(turn), size, (x, y))
        place_sprite(scene, draw_leaf(random), at, scale=2 * size / min(scene.size), turn=turn)


def draw_flower(scene: Image.Image, random: Random, kind: Kind, at: Point, *, scale: float, blur: float = 0) -> None:
    """Draw one flower of a kind, in one of its colours, on its stem."""
    colour = mix(pick(random, kind.colours), BLACK, random.uniform(0, 0.18))
    red, green, blue = (value + random.normal(0, 0.035) for value in colour)
    sprite = Sprite()
    kind.draw(sprite, random, (red, green, blue))
    half = scale * min(scene.size) / 2
    turn = random.normal(0, 9) if kind.is_upright else random.uniform(0, 360)
    squash = 1.0 if kind.is_upright else random.uniform(0.62, 1.0)
    foot = polar(-UP - math.radians(turn), 0.78 * half, at)
    draw_stem(scene, random, foot if kind.is_upright else at, scale=scale)
    place_sprite(scene, sprite.image(), at, scale=scale, turn=turn, squash=squash, blur=blur)


def light_scene(scene: Image.Image, random: Random) -> Image.Image:
    """Light the finished scene: exposure, a warm or cool tint, a brighter side, and a little grain."""
    x, y = np.meshgrid(np.linspace(-1, 1, scene.width), np.linspace(-1, 1, scene.height))
    angle, strength = random.uniform(0, math.tau), random.uniform(0, 0.25)
    light = random.uniform(0.9, 1.2) + strength * (x * math.cos(angle) + y * math.sin(angle))
    light -= random.uniform(0, 0.18) * (x**2 + y**2)
    warmth = random.normal(0, 0.05)
    tint = np.asarray((1 + warmth, 1.0, 1 - warmth))
    lit = np.asarray(scene) * light[..., None] * tint + random.normal(0, 0.8, (scene.height, scene.width, 1))
    return Image.fromarray(lit.clip(0, 255).round().astype(np.uint8))


def draw_image(class_name: str, split: str, number: int) -> Image.Image:
    """Draw picture `number` of a class and split; the same three always give the same pixels."""
    random = np.random.default_rng([int(class_name), list(IMAGES_PER_CLASS).index(split), number])
    kind = KINDS[class_name]
    final = (int(random.integers(200, 261)), int(random.integers(200, 261)))
    size = (final[0] * SUPERSAMPLING, final[1] * SUPERSAMPLING)
    scene = draw_background(random, size)
    for _ in range(pick(random, [0, 0, 1, 2])):
        at = (random.uniform(0.05, 0.95) * size[0], random.uniform(0.15, 0.8) * size[1])
        draw_flower(scene, random, kind, at, scale=random.uniform(0.3, 0.48), blur=random.uniform(0, 3))
    at = (random.uniform(0.34, 0.66) * size[0], random.uniform(0.34, 0.6) * size[1])
    draw_flower(scene, random, kind, at, scale=random.uniform(0.58, 1.0))
    if random.random() < 0.35:
        edge = (pick(random, [0.05, 0.95]) * size[0], random.uniform(0.75, 1.0) * size[1])
        turn, blur = random.uniform(-50, 50), random.uniform(2, 6)
        place_sprite(scene, draw_leaf(random), edge, scale=random.uniform(0.6, 1.0), turn=turn, blur=blur)
    return light_scene(scene.resize(final, Image.Resampling.LANCZOS), random)


def planned_images() -> dict[str, tuple[str, str, int]]:
    """Return every image of the set: its path inside the folder, and the class, split and number to draw it from."""
    return {
        f"{split}/{class_name}/image_{number:04d}.jpg": (class_name, split, number)
        for split, count in IMAGES_PER_CLASS.items()
        for class_name in KINDS
        for number in range(1, count + 1)
    }


def draw_flowers(output: Path) -> int:
    """Write the whole set into `output`, replacing files of the same names, and return the number of images."""
    plan = planned_images()
    for path, (class_name, split, number) in plan.items():
        target = output / path
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_image(class_name, split, number).save(target, **JPEG)
    names = {class_name: kind.display_name for class_name, kind in KINDS.items()}
    (output / "cat_to_name.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    return len(plan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the example flowers.")
    parser.add_argument("output", nargs="?", type=Path, default=Path(__file__).parent / "flowers")
    arguments = parser.parse_args()
    print(f"{draw_flowers(arguments.output)} images in {arguments.output}")
