"""Backgrounds of the drawn world: a dozen places painted with depth and soft gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

Color = Sequence[float]


class Backdrop:
    """A picture being painted; positions are shares of its width and height."""

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self.image = np.zeros((height, width, 3), np.uint8)
        self.width, self.height, self.rng = width, height, rng
        self.unit = min(width, height)
        self.mood = rng.uniform(0.93, 1.05, 3)

    def _color(self, color: Color) -> tuple[float, ...]:
        return tuple(float(value) for value in np.clip(np.array(color) * self.mood, 0, 255))

    def gradient(self, top: Color, bottom: Color, start: float = 0.0, end: float = 1.0) -> None:
        """Vertical gradient between two heights."""
        first, last = int(start * self.height), int(np.ceil(end * self.height))
        share = np.linspace(0, 1, max(1, last - first))[:, None]
        rows = np.array(self._color(top)) * (1 - share) + np.array(self._color(bottom)) * share
        self.image[first:last] = rows[:, None].astype(np.uint8)

    def polygon(self, points: Sequence[Sequence[float]], color: Color) -> None:
        pixels = np.round(np.array(points) * [self.width, self.height] * 16).astype(np.int32)
        cv2.fillPoly(self.image, [pixels], self._color(color), cv2.LINE_AA, 4)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        """Disc whose radius is a share of the shorter side."""
        center = (int(x * self.width * 16), int(y * self.height * 16))
        cv2.circle(
            self.image, center, max(8, int(radius * self.unit * 16)), self._color(color), -1, cv2.LINE_AA, 4
        )

    def glow(self, x: float, y: float, radius: float, color: Color, strength: float) -> None:
        """Soft light that fades from a point."""
        xs = (np.arange(self.width) / self.unit - x * self.width / self.unit)[None]
        ys = (np.arange(self.height) / self.unit - y * self.height / self.unit)[:, None]
        alpha = (strength * np.exp(-(xs**2 + ys**2) / (2 * radius**2))).astype(np.float32)[..., None]
        blended = self.image * (1 - alpha) + np.array(color, np.float32) * alpha
        self.image = np.clip(blended, 0, 255).astype(np.uint8)

    def ridge(self, level: float, roughness: float, color: Color, steps: int = 9) -> None:
        """A range of hills: everything below an uneven line."""
        xs = np.linspace(-0.1, 1.1, steps)
        ys = level + roughness * self.rng.uniform(-1, 1, steps)
        fine = np.linspace(-0.1, 1.1, 60)
        smooth = np.interp(fine, xs, ys)
        smooth = np.convolve(np.pad(smooth, 2, mode="edge"), np.ones(5) / 5, mode="valid")
        self.polygon([(-0.1, 1.1), *zip(fine, smooth, strict=True), (1.1, 1.1)], color)

    def soften(self, amount: float) -> None:
        """Blur as of a camera focused in front; ``amount`` is a share of the shorter side."""
        self.image = cv2.GaussianBlur(self.image, (0, 0), max(0.3, amount * self.unit))


def _clouds(place: Backdrop, count: int, color: Color) -> None:
    rng = place.rng
    for _ in range(count):
        x, y, size = rng.random(), rng.uniform(0.05, 0.3), rng.uniform(0.03, 0.06)
        for offset in (-1.2, -0.4, 0.4, 1.2):
            place.disc(
                x + offset * size, y - (abs(offset) < 1) * size * 0.5, size * (1.2 - 0.3 * abs(offset)), color
            )


def beach(place: Backdrop) -> None:
    horizon = place.rng.uniform(0.45, 0.58)
    place.gradient((96, 178, 236), (206, 236, 250), 0, horizon)
    _clouds(place, 2, (246, 250, 253))
    sun = place.rng.random()
    place.glow(sun, 0.12, 0.12, (255, 250, 220), 0.9)
    place.gradient((42, 140, 186), (116, 202, 208), horizon, horizon + 0.18)
    for _ in range(5):
        y, x = horizon + place.rng.uniform(0.02, 0.16), place.rng.random()
        place.box(x, y, x + 0.18, y + 0.008, (196, 232, 234))
    place.gradient((240, 222, 172), (222, 190, 130), horizon + 0.17, 1)
    place.polygon(
        [
            (-0.1, horizon + 0.17),
            (0.5, horizon + 0.155),
            (1.1, horizon + 0.18),
            (1.1, horizon + 0.2),
            (-0.1, horizon + 0.19),
        ],
        (250, 246, 232),
    )
    if place.rng.random() < 0.6:
        x = place.rng.choice([0.06, 0.94])
        for turn in np.linspace(0.2, 2.9, 6):
            tip = (x + 0.24 * np.cos(turn), 0.2 - 0.16 * np.sin(turn) + 0.06)
            place.polygon(
                [(x, 0.17), tip, (x + 0.1 * np.cos(turn + 0.3), 0.25 - 0.1 * np.sin(turn))], (52, 128, 70)
            )
        place.polygon([(x - 0.012, 0.2), (x + 0.012, 0.2), (x + 0.03, 0.75), (x - 0.01, 0.75)], (132, 98, 62))
    place.soften(0.006)


def forest(place: Backdrop) -> None:
    rng = place.rng
    place.gradient((196, 222, 160), (96, 140, 84))
    place.glow(rng.random(), 0.1, 0.3, (250, 250, 200), 0.7)
    for layer, trunk in enumerate(((150, 164, 112), (104, 106, 70), (78, 62, 44))):
        for _ in range(5 - layer):
            x, half = rng.random(), (0.012 + 0.012 * layer) * rng.uniform(0.8, 1.3)
            place.polygon([(x - half, 0), (x + half, 0), (x + half * 1.3, 1), (x - half * 1.3, 1)], trunk)
        for _ in range(9):
            shade = rng.uniform(0.85, 1.15)
            leaf = np.array(((140, 180, 96), (92, 150, 72), (56, 112, 58))[layer]) * shade
            place.disc(rng.random(), rng.uniform(-0.05, 0.25 - 0.03 * layer), rng.uniform(0.05, 0.11), leaf)
        place.soften(0.006)
    place.gradient((86, 124, 62), (58, 92, 48), rng.uniform(0.78, 0.86), 1)
    place.soften(0.008)


def city(place: Backdrop) -> None:
    rng = place.rng
    place.gradient((138, 182, 226), (232, 232, 226))
    for layer, tone in enumerate(((176, 188, 206), (140, 142, 160))):
        x = -0.05
        while x < 1.05:
            width, top = rng.uniform(0.1, 0.2), rng.uniform(0.1, 0.42) + 0.1 * layer
            wall = np.array(tone) * rng.uniform(0.85, 1.1) + rng.uniform(-10, 10, 3)
            place.box(x, top, x + width, 1, wall)
            place.box(x + width * 0.82, top, x + width, 1, wall * 0.86)
            columns = 3 if layer else 2
            for row in np.arange(top + 0.04, 0.95, 0.075):
                for column in range(columns):
                    left = x + width * (0.1 + 0.72 * column / columns)
                    window = (248, 226, 160) if rng.random() < 0.35 else wall * 0.72
                    place.box(left, row, left + width * 0.14, row + 0.035, window)
            x += width + rng.uniform(0.0, 0.02)
        place.soften(0.004)
    place.gradient((128, 128, 134), (104, 104, 112), 0.86, 1)
    place.soften(0.005)


def office(place: Backdrop) -> None:
    rng = place.rng
    place.gradient((232, 232, 226), (206, 206, 202))
    flip = (lambda x: 1 - x) if rng.random() < 0.5 else (lambda x: x)
    place.box(flip(0.06), 0.08, flip(0.46), 0.5, (246, 246, 246))
    place.box(flip(0.08), 0.1, flip(0.44), 0.48, (176, 212, 238))
    place.box(flip(0.25), 0.1, flip(0.27), 0.48, (246, 246, 246))
    for level in (0.2, 0.36, 0.52):
        place.box(flip(0.58), level, flip(0.99), level + 0.018, (160, 122, 86))
        x = 0.6
        while x < 0.95:
            width = rng.uniform(0.018, 0.034)
            place.box(
                flip(x), level - rng.uniform(0.07, 0.11), flip(x + width), level, rng.uniform(70, 220, 3)
            )
            x += width + 0.004
    place.gradient((170, 132, 98), (140, 106, 78), 0.8, 1)
    place.box(flip(0.02), 0.66, flip(0.2), 0.8, (60, 64, 72))
    place.box(flip(0.035), 0.675, flip(0.185), 0.785, (120, 170, 200))
    place.soften(0.006)


def sunset(place: Backdrop) -> None:
    rng = place.rng
    horizon = rng.uniform(0.52, 0.64)
    place.gradient((92, 66, 140), (232, 110, 110), 0, horizon * 0.6)
    place.gradient((232, 110, 110), (255, 190, 104), horizon * 0.6, horizon)
    x = rng.uniform(0.1, 0.9)
    place.glow(x, horizon - 0.03, 0.22, (255, 220, 140), 0.8)
    place.disc(x, horizon - 0.04, 0.09, (255, 240, 190))
    for _ in range(4):
        left, y = rng.uniform(-0.1, 0.9), rng.uniform(0.08, 0.4)
        place.polygon(
            [(left, y), (left + 0.15, y - 0.012), (left + 0.32, y), (left + 0.15, y + 0.012)], (250, 160, 130)
        )
    place.gradient((196, 104, 104), (78, 50, 92), horizon, 1)
    for row in range(5):
        y = horizon + 0.03 + 0.06 * row
        place.box(x - 0.1 - 0.02 * row, y, x + 0.1 + 0.02 * row, y + 0.014, (255, 196, 128))
    place.soften(0.008)


def snow(place: Backdrop) -> None:
    rng = place.rng
    place.gradient((172, 198, 228), (236, 242, 250))
    place.ridge(0.42, 0.05, (206, 216, 234))
    for x in np.linspace(0, 1, 7) + rng.uniform(-0.05, 0.05, 7):
        base, size = rng.uniform(0.6, 0.68), rng.uniform(0.1, 0.18)
        for step in range(3):
            y = base - step * size * 0.55
            half = size * (0.55 - 0.13 * step)
            place.polygon([(x - half, y), (x, y - size), (x + half, y)], np.array((92, 132, 130)) + 14 * step)
            place.polygon(
                [(x - half * 0.45, y - size * 0.55), (x, y - size), (x + half * 0.45, y - size * 0.55)],
                (244, 248, 252),
            )
    place.ridge(0.66, 0.02, (244, 247, 252))
    place.soften(0.006)
    for _ in range(34):
        place.disc(rng.random(), rng.random(), rng.uniform(0.006, 0.013), (255, 255, 255))


def room(place: Backdrop) -> None:
    rng = place.rng
    wall = np.array(
        ((206, 178, 150), (176, 196, 178), (190, 186, 206), (214, 190, 170))[rng.integers(4)], float
    )
    place.gradient(wall * 1.06, wall * 0.9)
    side = rng.choice([0, 1])
    lamp, art = (0.12, 0.76) if side else (0.88, 0.24)
    frame = rng.uniform(80, 220, 3)
    place.box(art - 0.15, 0.08, art + 0.15, 0.42, (250, 246, 238))
    place.box(art - 0.125, 0.105, art + 0.125, 0.395, frame)
    place.disc(art + 0.04, 0.2, 0.05, (250, 220, 150))
    place.polygon(
        [
            (art - 0.125, 0.395),
            (art - 0.03, 0.27),
            (art + 0.04, 0.34),
            (art + 0.125, 0.25),
            (art + 0.125, 0.395),
        ],
        frame * 0.6,
    )
    place.box(lamp - 0.008, 0.32, lamp + 0.008, 0.9, (90, 74, 60))
    place.polygon(
        [(lamp - 0.06, 0.16), (lamp + 0.06, 0.16), (lamp + 0.1, 0.34), (lamp - 0.1, 0.34)], (250, 226, 170)
    )
    place.glow(lamp, 0.28, 0.2, (255, 236, 180), 0.6)
    sofa = np.array(((120, 70, 74), (70, 96, 120), (86, 110, 84))[rng.integers(3)], float)
    place.box(-0.05, 0.64, 1.05, 0.95, sofa)
    place.box(-0.05, 0.62, 1.05, 0.68, sofa * 1.14)
    place.gradient((150, 112, 80), (126, 92, 66), 0.93, 1)
    place.soften(0.007)


def garden(place: Backdrop) -> None:
    rng = place.rng
    place.gradient((150, 208, 240), (222, 240, 236), 0, 0.45)
    _clouds(place, 2, (248, 252, 253))
    place.ridge(0.36, 0.03, (150, 192, 128))
    for _ in range(8):
        place.disc(
            rng.random(),
            rng.uniform(0.36, 0.5),
            rng.uniform(0.06, 0.12),
            np.array((92, 154, 84)) * rng.uniform(0.85, 1.15),
        )
    place.ridge(0.56, 0.015, (122, 184, 92))
    place.soften(0.007)
    petals = ((240, 110, 130), (250, 206, 90), (246, 246, 246), (186, 120, 210), (250, 150, 90))
    for _ in range(46):
        y = rng.uniform(0.55, 1.0)
        place.disc(rng.random(), y, 0.008 + 0.02 * (y - 0.5), petals[rng.integers(len(petals))])
    place.soften(0.004)


def night(place: Backdrop) -> None:
    rng = place.rng
    place.gradient((16, 22, 58), (58, 62, 112))
    for _ in range(40):
        shine = rng.uniform(150, 250)
        place.disc(
            rng.random(),
            rng.uniform(0, 0.55),
            rng.uniform(0.004, 0.008),
            (shine, shine, min(255, shine + 10)),
        )
    moon = rng.uniform(0.08, 0.92)
    place.glow(moon, 0.14, 0.1, (190, 200, 240), 0.6)
    place.disc(moon, 0.14, 0.06, (248, 244, 218))
    x = -0.02
    while x < 1.02:
        width, top = rng.uniform(0.08, 0.16), rng.uniform(0.48, 0.68)
        place.box(x, top, x + width, 1, np.array((34, 36, 70)) * rng.uniform(0.8, 1.15))
        for row in np.arange(top + 0.03, 0.95, 0.06):
            for column in (0.2, 0.6):
                if rng.random() < 0.45:
                    place.box(
                        x + width * column, row, x + width * (column + 0.2), row + 0.025, (250, 212, 120)
                    )
        x += width
    place.soften(0.004)


def cafe(place: Backdrop) -> None:
    rng = place.rng
    place.gradient((122, 84, 62), (92, 62, 46))
    place.box(0.0, 0.0, 1.0, 0.06, (70, 46, 36))
    place.box(0.28, 0.14, 0.72, 0.42, (46, 58, 52))
    for row in range(4):
        place.box(
            0.33, 0.19 + 0.055 * row, 0.33 + rng.uniform(0.15, 0.33), 0.2 + 0.055 * row, (214, 214, 200)
        )
    for x in (0.12, 0.5, 0.88):
        x += rng.uniform(-0.03, 0.03)
        place.box(x - 0.003, 0, x + 0.003, 0.12, (40, 30, 26))
        place.disc(x, 0.15, 0.05, (255, 226, 150))
        place.glow(x, 0.15, 0.12, (255, 214, 130), 0.75)
    place.box(-0.05, 0.6, 1.05, 0.65, (176, 128, 88))
    place.gradient((138, 96, 66), (104, 72, 52), 0.65, 1)
    for _ in range(6):
        x = rng.random()
        place.box(x, 0.545, x + 0.04, 0.6, rng.choice([(240, 236, 226), (200, 90, 70), (80, 140, 150)]))
    place.soften(0.009)


def mountains(place: Backdrop) -> None:
    rng = place.rng
    place.gradient((120, 176, 228), (226, 238, 244), 0, 0.6)
    _clouds(place, 1, (250, 252, 253))
    for layer, (tone, level) in enumerate((((146, 160, 190), 0.42), ((108, 122, 154), 0.5))):
        for x in np.linspace(0, 1, 3 + layer) + rng.uniform(-0.1, 0.1, 3 + layer):
            top, half = level - rng.uniform(0.2, 0.34), rng.uniform(0.24, 0.34)
            place.polygon([(x - half, 0.75), (x, top), (x + half, 0.75)], tone)
            place.polygon([(x, top), (x + half, 0.75), (x + half * 0.2, 0.75)], np.array(tone) * 0.86)
            cap = 0.3
            place.polygon(
                [
                    (x - half * cap, top + (0.75 - top) * cap),
                    (x, top),
                    (x + half * cap, top + (0.75 - top) * cap),
                    (x + half * 0.08, top + (0.75 - top) * cap * 0.7),
                ],
                (246, 249, 253),
            )
    place.ridge(0.64, 0.03, (104, 148, 92))
    place.ridge(0.76, 0.02, (82, 126, 74))
    place.soften(0.006)


def studio(place: Backdrop) -> None:
    tones = (
        (226, 150, 120),
        (120, 168, 190),
        (222, 196, 120),
        (160, 140, 190),
        (140, 180, 150),
        (200, 200, 204),
    )
    color = np.array(tones[place.rng.integers(len(tones))], float) * place.rng.uniform(0.9, 1.06)
    place.gradient(color * 0.96, color * 0.8)
    place.glow(0.5, 0.42, 0.36, np.clip(color * 1.2 + 10, 0, 255), 0.75)


PLACES: dict[str, Callable[[Backdrop], None]] = {
    "beach": beach,
    "forest": forest,
    "city": city,
    "office": office,
    "sunset": sunset,
    "snow": snow,
    "room": room,
    "garden": garden,
    "night": night,
    "cafe": cafe,
    "mountains": mountains,
    "studio": studio,
}
SCENES: tuple[str, ...] = tuple(PLACES)


def draw_scene(name: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Paint a place: (height, width, 3) uint8 RGB."""
    place = Backdrop(width, height, rng)
    PLACES[name](place)
    return place.image
