"""How a person is drawn: a head of turned cross-sections, features laid on its surface, soft light.

Coordinates of the face are in head units: ``u`` to the picture's right, ``v`` down, ``z`` towards the
viewer, origin at the middle of the head. :class:`Head` turns them by yaw, pitch and roll into pixels, so
landmarks and the face's box are exact by construction. Colours are RGB in 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from .world import Appearance, Identity

SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates

HAIR_COLORS = {
    "black": (38, 33, 36),
    "brown": (98, 62, 38),
    "blond": (226, 188, 108),
    "red": (190, 84, 38),
    "grey": (172, 172, 178),
    "blue": (66, 102, 208),
    "pink": (236, 128, 178),
}
CLOTHES_COLORS = {
    "red": (204, 56, 58),
    "orange": (238, 138, 58),
    "yellow": (244, 206, 80),
    "green": (64, 152, 96),
    "blue": (62, 98, 194),
    "purple": (130, 84, 168),
    "pink": (240, 150, 180),
    "black": (48, 48, 56),
    "white": (238, 238, 236),
}


# ------------------------------------------------------------------------------------------------------ light
@dataclass(frozen=True)
class Light:
    """Where light comes from (``x`` to the right, ``y`` down), and how it colours the whole picture."""

    name: str
    x: float
    y: float
    ambient: float
    gain: float
    tint: tuple[float, float, float]


#: name -> (least and most sideways slant, ambient share, gain, tint)
LIGHTS = {
    "daylight": ((0.0, 0.5), 0.72, 1.04, (1.00, 1.00, 1.00)),
    "warm light": ((0.1, 0.7), 0.66, 1.02, (1.12, 0.98, 0.76)),
    "cool light": ((0.1, 0.7), 0.68, 1.00, (0.86, 0.97, 1.12)),
    "side light": ((1.5, 2.0), 0.36, 1.10, (1.02, 1.00, 0.97)),
    "dim light": ((0.0, 0.7), 0.66, 0.66, (0.97, 0.97, 1.04)),
}


def make_light(name: str, rng: np.random.Generator) -> Light:
    """A light of this name, from a random side."""
    (least, most), ambient, gain, tint = LIGHTS[name]
    x = rng.choice([-1.0, 1.0]) * rng.uniform(least, most)
    jitter = rng.uniform(-0.025, 0.025, 3)
    return Light(
        name=name,
        x=float(x),
        y=float(rng.uniform(-0.85, -0.35)),
        ambient=float(ambient + rng.uniform(-0.05, 0.05)),
        gain=float(gain * rng.uniform(0.96, 1.04)),
        tint=tuple(float(value) for value in np.array(tint) + jitter),
    )


# ----------------------------------------------------------------------------------------------------- canvas
def smooth_curve(points: np.ndarray, steps: int = 6, closed: bool = True) -> np.ndarray:
    """Catmull-Rom spline through points (N, D): (N * steps, D), or one more point if open."""
    points = np.asarray(points, np.float64)
    if closed:
        padded = np.vstack([points[-1], points, points[:2]])
    else:
        padded = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    share = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    before, start, end, after = (padded[k : len(padded) - 3 + k, None] for k in range(4))
    curve = 0.5 * (
        2 * start
        + (end - before) * share
        + (2 * before - 5 * start + 4 * end - after) * share**2
        + (3 * start - before - 3 * end + after) * share**3
    )
    curve = curve.reshape(-1, points.shape[1])
    return curve if closed else np.vstack([curve, points[-1]])


CIRCLE = np.stack(
    [
        np.cos(np.linspace(0, 2 * np.pi, 28, endpoint=False)),
        np.sin(np.linspace(0, 2 * np.pi, 28, endpoint=False)),
    ],
    -1,
)


def shade_of(color: Sequence[float], amount: float) -> np.ndarray:
    """A darker (amount < 0: towards violet) or lighter (amount > 0: towards cream) neighbour of a colour."""
    color = np.asarray(color, np.float64)
    if amount < 0:
        return color * (1 + amount * np.array([1.0, 1.08, 0.92]))
    return color + (np.array([255.0, 248.0, 232.0]) - color) * amount


class Canvas:
    """An enlarged picture with anti-aliased fills, strokes and soft blends. Positions in its own pixels."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.height, self.width = image.shape[:2]

    @classmethod
    def enlarged(cls, image: np.ndarray, factor: int) -> Canvas:
        size = (image.shape[1] * factor, image.shape[0] * factor)
        return cls(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR))

    @staticmethod
    def _fixed(points: np.ndarray) -> np.ndarray:
        return np.round(np.clip(points, -1e4, 1e4) * (1 << SHIFT)).astype(np.int32)

    @staticmethod
    def _color(color: Sequence[float]) -> tuple[float, ...]:
        return tuple(min(255.0, max(0.0, float(value))) for value in color)

    def fill(self, points: np.ndarray, color: Sequence[float]) -> None:
        cv2.fillPoly(self.image, [self._fixed(points)], self._color(color), cv2.LINE_AA, SHIFT)

    def stroke(self, points: np.ndarray, color: Sequence[float], width: float, closed: bool = False) -> None:
        thickness = max(1, int(round(width)))
        cv2.polylines(
            self.image, [self._fixed(points)], closed, self._color(color), thickness, cv2.LINE_AA, SHIFT
        )

    def dot(self, center: np.ndarray, radius: float, color: Sequence[float]) -> None:
        self.fill(np.asarray(center) + CIRCLE * radius, color)

    def mask(self, points: np.ndarray) -> np.ndarray:
        """(H, W) uint8 coverage of a polygon."""
        mask = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(mask, [self._fixed(points)], 255, cv2.LINE_AA, SHIFT)
        return mask

    def _region(self, points: np.ndarray, pad: int) -> tuple[slice, slice] | None:
        (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
        x0, x1 = max(0, math.floor(left) - pad), min(self.width, math.ceil(right) + pad + 1)
        y0, y1 = max(0, math.floor(top) - pad), min(self.height, math.ceil(bottom) + pad + 1)
        return None if x1 - x0 < 1 or y1 - y0 < 1 else (slice(y0, y1), slice(x0, x1))

    def _coverage(
        self,
        points: np.ndarray,
        region: tuple[slice, slice],
        alpha: float,
        blur: float,
        clip: np.ndarray | None,
    ) -> np.ndarray:
        """(h, w, 1) float32 opacity of a polygon inside a region."""
        rows, columns = region
        mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        cv2.fillPoly(mask, [self._fixed(points - [columns.start, rows.start])], 255, cv2.LINE_AA, SHIFT)
        if blur >= 0.6:
            mask = cv2.GaussianBlur(mask, (0, 0), blur)
        if clip is not None:
            mask = cv2.multiply(mask, clip[region], scale=1 / 255)
        return (mask.astype(np.float32) * (alpha / 255))[..., None]

    def blend(
        self,
        points: np.ndarray,
        color: Sequence[float],
        alpha: float = 1.0,
        blur: float = 0.0,
        clip: np.ndarray | None = None,
    ) -> None:
        """Lay a soft-edged polygon over the picture, optionally only where ``clip`` (H, W) allows."""
        region = self._region(points, int(2.5 * blur) + 1)
        if region is None:
            return
        opacity = self._coverage(points, region, alpha, blur, clip)
        part = self.image[region].astype(np.float32)
        change = np.array(self._color(color), np.float32) - part
        change *= opacity
        change += part
        self.image[region] = change

    def shaded(self, points: np.ndarray, color: Sequence[float], light: Light, depth: float = 0.3) -> None:
        """Fill a polygon with a gradient from its lit to its shaded side."""
        region = self._region(points, 1)
        if region is None:
            return
        opacity = self._coverage(points, region, 1.0, 0.0, None)
        middle, span = points.mean(0), np.maximum(np.ptp(points, axis=0), 1)
        xs = ((np.arange(region[1].start, region[1].stop) - middle[0]) / span[0]).astype(np.float32)[None]
        ys = ((np.arange(region[0].start, region[0].stop) - middle[1]) / span[1]).astype(np.float32)[:, None]
        depth = depth * (1.25 - 0.6 * light.ambient)
        lit = np.clip(0.62 + xs * light.x * 0.8 + ys * light.y * 0.55, 0, 1)[..., None]
        dark, bright = shade_of(color, -depth), shade_of(color, 0.10)
        gradient = (dark + (bright - dark) * lit).astype(np.float32)
        part = self.image[region].astype(np.float32)
        self.image[region] = np.clip(part + (gradient - part) * opacity, 0, 255)


def finish(canvas: Canvas, light: Light, factor: int) -> np.ndarray:
    """Shrink the enlarged picture and let the light colour it: (H, W, 3) uint8."""
    size = (canvas.width // factor, canvas.height // factor)
    image = cv2.resize(canvas.image, size, interpolation=cv2.INTER_AREA)
    table = np.clip(np.arange(256)[:, None] * light.gain * np.array(light.tint), 0, 255).astype(np.uint8)
    return cv2.LUT(image, np.ascontiguousarray(table[:, None, :]))


# ------------------------------------------------------------------------------------------------------- head
class Head:
    """One head in one pose: cross-sections (ellipses) from crown to chin, turned and placed."""

    FACE_TOP = -0.72  # where a face detector's box begins

    def __init__(self, identity: Identity, look: Appearance, center: np.ndarray, scale: float) -> None:
        self.identity, self.look = identity, look
        self.center, self.scale = np.asarray(center, np.float64), float(scale)
        self.cos_yaw, self.sin_yaw = np.cos(look.yaw), np.sin(look.yaw)
        self.cos_pitch, self.sin_pitch = np.cos(look.pitch), np.sin(look.pitch)
        self.cos_roll, self.sin_roll = np.cos(look.roll), np.sin(look.roll)
        self.width = identity["face_width"] * (1 + 0.035 * look.weight)
        self.jaw_drop = {"laughing": 0.09, "surprised": 0.13}.get(look.expression, 0.0)
        self.sections = self._sections()
        self.heights = np.maximum.accumulate(self.sections[:, 0])
        self.columns = tuple(np.ascontiguousarray(self.sections[:, column]) for column in (1, 2, 3))

    @classmethod
    def placed(
        cls, identity: Identity, look: Appearance, place: np.ndarray, size: tuple[int, int], factor: int
    ) -> Head:
        """The head whose face box has this centre and height (pixels), moved inside the picture if needed."""
        unit = cls(identity, look, np.zeros(2), 1.0).face_box()
        width, height = unit[2:] - unit[:2]
        limit = np.array(size, float) - 2
        scale = min(float(place[2]) / height, limit[0] / width, limit[1] / height)
        half = np.array([width, height]) * scale / 2
        middle = np.clip(place[:2], half + 1, np.array(size) - half - 1)
        center = middle - scale * (unit[:2] + unit[2:]) / 2
        return cls(identity, look, center * factor, scale * factor)

    def _sections(self) -> np.ndarray:
        """(M, 4): height v, half-width, centre depth, half-depth, from crown to chin."""
        trait, width = self.identity, self.width
        top, chin = -trait["forehead_height"], 1.06 + trait["chin_length"] + self.jaw_drop
        forehead, cheek = width * trait["forehead_width"], width * trait["cheekbones"]
        jaw = width * trait["jaw"] * (1 + 0.05 * self.look.weight)
        chin_width, ahead = trait["chin_width"], trait["chin_forward"]
        drop = 0.6 * self.jaw_drop
        hollow = 0.03 * trait["hollow_cheeks"]
        keys = np.array(
            [
                (top, 0.0, -0.06, 0.0),
                (top + 0.08, 0.52 * forehead, -0.06, 0.50),
                (0.67 * top, 0.93 * forehead, -0.05, 0.78),
                (0.36 * top, 0.99 * (forehead + cheek) / 2, -0.03, 0.85),
                (-0.05, cheek, 0.0, 0.86),
                (0.26, 0.975 * cheek - hollow, 0.07, 0.80),
                (0.62 + drop, jaw, 0.28, 0.60),
                (
                    0.88 + 0.5 * trait["chin_length"] + drop,
                    0.5 * jaw + 0.5 * chin_width + 0.02,
                    0.46 + ahead / 2,
                    0.36,
                ),
                (chin - 0.07, 0.84 * chin_width, 0.60 + ahead, 0.18),
                (chin, 0.0, 0.68 + ahead, 0.0),
            ]
        )
        sections = smooth_curve(keys, steps=6, closed=False)
        sections[:, 1] = np.maximum(sections[:, 1], 0)
        sections[:, 3] = np.maximum(sections[:, 3], 0)
        return sections

    def at(self, v: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Half-width, centre depth and half-depth of the cross-section at height v."""
        return tuple(np.interp(v, self.heights, column) for column in self.columns)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Turn and place points (N, 3) of head units: (N, 2) pixels."""
        return self._turned(*np.asarray(points, np.float64).T)

    def _turned(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        x, z = x * self.cos_yaw + z * self.sin_yaw, z * self.cos_yaw - x * self.sin_yaw
        y = y * self.cos_pitch + z * self.sin_pitch
        pixels = np.empty((len(x), 2))
        pixels[:, 0] = self.center[0] + self.scale * (x * self.cos_roll - y * self.sin_roll)
        pixels[:, 1] = self.center[1] + self.scale * (x * self.sin_roll + y * self.cos_roll)
        return pixels

    def upright(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 2) that tilt with the head but do not turn: (N, 2) pixels."""
        x, y = np.asarray(points, np.float64).T
        turned = np.stack([x * self.cos_roll - y * self.sin_roll, x * self.sin_roll + y * self.cos_roll], -1)
        return self.center + self.scale * turned

    def surface(self, points: np.ndarray, lift: np.ndarray | float = 0.0) -> np.ndarray:
        """Points (N, 2) of (u, v) on the front of the face, raised by ``lift``: (N, 2) pixels."""
        u, v = np.asarray(points, np.float64).reshape(-1, 2).T
        width, middle, depth = self.at(v)
        across = np.minimum(np.abs(u) / np.maximum(width, 1e-3), 0.995)
        return self._turned(u, v, middle + depth * np.sqrt(1 - across**2) + lift)

    def rim(self, side: int, top: float, bottom: float, grow: float = 0.0, steps: int = 14) -> np.ndarray:
        """The outline on one side (-1 left, 1 right) between two heights: (steps, 2) pixels."""
        v = np.linspace(top, bottom, steps)
        inside = np.clip(v, self.sections[0, 0], self.sections[-1, 0])
        width, middle, depth = self.at(inside)
        return self.pixels(self._extreme(side, v, width + grow, middle, depth + grow))

    def _extreme(
        self, side: int, v: np.ndarray, width: np.ndarray, middle: np.ndarray, depth: np.ndarray
    ) -> np.ndarray:
        """The points of elliptic cross-sections that stand out furthest to one side: (N, 3)."""
        reach = np.sqrt((width * self.cos_yaw) ** 2 + (depth * self.sin_yaw) ** 2) + 1e-9
        x = side * width**2 * self.cos_yaw / reach
        z = middle + side * depth**2 * self.sin_yaw / reach
        return np.column_stack([x, v, z])

    def outline(self) -> np.ndarray:
        """The whole head's silhouette: (2M, 2) pixels."""
        v, width, middle, depth = self.sections.T
        right = self.pixels(self._extreme(1, v, width, middle, depth))
        left = self.pixels(self._extreme(-1, v, width, middle, depth))
        return np.vstack([right, left[::-1]])

    def face_box(self) -> np.ndarray:
        """Tight box (4,) xyxy of the face from forehead to chin, in canvas pixels."""
        v, width, middle, depth = self.sections[self.sections[:, 0] >= self.FACE_TOP].T
        sides = np.vstack([self.surface(np.stack([side * width * 0.97, v], -1)) for side in (-1, 1)])
        front = self.surface(np.stack([np.zeros_like(v), v], -1))
        points = np.vstack([sides, front, self.landmarks()])
        return np.concatenate([points.min(0), points.max(0)])

    def eye(self, side: int) -> tuple[float, float]:
        """Middle (u, v) of an eye."""
        trait = self.identity
        return side * trait["eye_spacing"], trait["eye_height"] + side * trait["eye_asymmetry"]

    def nose_tip(self) -> np.ndarray:
        trait = self.identity
        tip = (trait["nose_asymmetry"], trait["eye_height"] + trait["nose_length"] - 0.02)
        return self.surface(np.array([tip]), trait["nose_lift"])[0]

    def mouth(self) -> MouthShape:
        shape = MouthShape.of(self.identity, self.look, self.jaw_drop)
        widest = 0.74 * float(self.at(shape.height)[0])
        return replace(shape, half_width=min(shape.half_width, widest))

    def landmarks(self) -> np.ndarray:
        """(5, 2) canvas pixels: left eye, right eye, nose tip, left and right mouth corner as seen."""
        eyes = self.surface(np.array([self.eye(-1), self.eye(1)]))
        return np.vstack([eyes, self.nose_tip(), self.surface(self.mouth().corners(), 0.03)])


@dataclass(frozen=True)
class MouthShape:
    """Curves of the mouth for one expression, in (u, v)."""

    half_width: float
    height: float
    opening: float
    smile: float
    slant: float
    upper: float
    lower: float
    bow: float

    #: expression -> (width factor, opening, lift of the corners)
    POSES = {
        "neutral": (1.00, 0.00, 0.000),
        "smiling": (1.22, 0.00, 0.115),
        "laughing": (1.25, 0.20, 0.100),
        "surprised": (0.66, 0.24, 0.000),
        "sad": (0.98, 0.00, -0.095),
        "angry": (1.02, 0.05, -0.035),
    }

    @classmethod
    def of(cls, identity: Identity, look: Appearance, jaw_drop: float) -> MouthShape:
        width, opening, smile = cls.POSES[look.expression]
        return cls(
            half_width=identity["mouth_width"] * width,
            height=identity["mouth_height"] + 0.3 * identity["chin_length"] + 0.25 * jaw_drop,
            opening=opening,
            smile=smile + identity["mouth_corners"],
            slant=identity["mouth_asymmetry"],
            upper=identity["upper_lip"] * (0.8 if look.expression in ("smiling", "laughing") else 1.0),
            lower=identity["lower_lip"] * (0.85 if look.expression in ("smiling", "laughing") else 1.0),
            bow=identity["cupids_bow"],
        )

    def _along(self, offset: np.ndarray | float) -> np.ndarray:
        across = np.linspace(-1, 1, 15)
        base = self.height - self.smile * across**2 + self.smile * 0.25 + self.slant * across
        return np.stack([across * self.half_width, base + offset], -1)

    @property
    def _bulge(self) -> np.ndarray:
        across = np.linspace(-1, 1, 15)
        return 1 - across**2

    def upper_line(self) -> np.ndarray:
        """Lower edge of the upper lip: (15, 2)."""
        return self._along(-self.opening * 0.22 * self._bulge)

    def lower_line(self) -> np.ndarray:
        """Upper edge of the lower lip: (15, 2)."""
        return self._along(self.opening * 0.78 * self._bulge**0.8)

    def upper_edge(self) -> np.ndarray:
        across = np.linspace(-1, 1, 15)
        notch = 1 - 0.45 * self.bow * np.exp(-((across / 0.17) ** 2))
        return self._along(-self.opening * 0.22 * self._bulge - self.upper * self._bulge**0.65 * notch)

    def lower_edge(self) -> np.ndarray:
        return self._along(self.opening * 0.78 * self._bulge**0.8 + self.lower * self._bulge**0.7)

    def corners(self) -> np.ndarray:
        return self._along(0.0)[[0, -1]]


# ----------------------------------------------------------------------------------------------------- sitter
@dataclass
class Sitter:
    """What every drawing function needs: where to draw, the geometry, who it is, how they look, the light."""

    canvas: Canvas
    head: Head
    identity: Identity
    look: Appearance
    light: Light
    rng: np.random.Generator
    face_mask: np.ndarray | None = None

    @property
    def scale(self) -> float:
        return self.head.scale

    @property
    def skin(self) -> np.ndarray:
        return np.array(self.identity.skin)

    @property
    def hair(self) -> np.ndarray:
        return np.array(HAIR_COLORS[self.look.hair_color], float)

    def near_side(self) -> int:
        """The side (-1 left, 1 right) of the head that is turned towards the viewer."""
        return -1 if self.look.yaw > 0 else 1

    def body(self, points: Sequence[Sequence[float]]) -> np.ndarray:
        """Points of the body, which neither turns nor tilts with the head: (N, 2) pixels."""
        sway = np.array([-0.06 * self.head.sin_yaw - 0.25 * self.head.sin_roll, 0.0])
        return self.head.center + self.scale * (np.asarray(points, np.float64) + sway)

    def soft(self, points: np.ndarray, color: Sequence[float], alpha: float, blur: float) -> None:
        """Soft blend inside the face; ``blur`` in head units."""
        self.canvas.blend(points, color, alpha, blur * self.scale, self.face_mask)

    def line(self, points: np.ndarray, color: Sequence[float], width: float, closed: bool = False) -> None:
        """Stroke; ``width`` in head units."""
        self.canvas.stroke(points, color, width * self.scale, closed)


def draw_person(canvas: Canvas, head: Head, identity: Identity, look: Appearance, light: Light) -> None:
    """Draw one person, back to front."""
    from . import face, outfit
    from . import hair as hairdo

    sitter = Sitter(canvas, head, identity, look, light, np.random.default_rng([0xD7, look.detail_seed]))
    hairdo.draw_back(sitter)
    outfit.draw_body(sitter)
    face.draw_face(sitter)
    hairdo.draw_front(sitter)
    outfit.draw_hat(sitter)
    outfit.draw_glasses(sitter)
