"""What a drawn person wears: clothes, hats, glasses, and the neck and shoulders under them."""

from __future__ import annotations

import numpy as np

from .draw import CIRCLE, CLOTHES_COLORS, Sitter, shade_of, smooth_curve

FRAME_COLORS = ((36, 34, 40), (128, 52, 40), (176, 136, 60), (50, 70, 130))

BELOW = 14.0  # far enough down to leave any picture, in head units


def draw_body(sitter: Sitter) -> None:
    """Neck, shoulders and clothes."""
    canvas, light, skin = sitter.canvas, sitter.light, sitter.skin
    build = 1 + 0.07 * sitter.look.weight
    neck = 0.43 * sitter.head.width / 0.8 * build
    color = np.array(CLOTHES_COLORS[sitter.look.clothing_color], float)
    column = sitter.body(
        [
            (-neck, 0.45),
            (neck, 0.45),
            (neck * 1.02, 1.25),
            (neck * 1.5, 1.62),
            (-neck * 1.5, 1.62),
            (-neck * 1.02, 1.25),
        ]
    )
    canvas.shaded(column, shade_of(skin, -0.12), light, 0.25)
    shadow = sitter.head.outline() + [0.0, 0.16 * sitter.scale]
    canvas.blend(shadow, shade_of(skin, -0.48), 0.6, 0.05 * sitter.scale, canvas.mask(column))
    half = [
        (neck * 1.02, 1.30),
        (0.78 * build, 1.46),
        (1.28 * build, 1.66),
        (1.52 * build, 2.05),
        (1.62 * build, 2.8),
        (1.66 * build, 4.6),
    ]
    right = np.vstack([smooth_curve(np.array(half), 4, closed=False), [(1.66 * build, BELOW)]])
    shoulders = np.vstack([right, (right * [-1, 1])[::-1]])
    dip = np.array([(-neck * 0.55, 1.50), (0.0, 1.58), (neck * 0.55, 1.50)])
    torso = sitter.body(np.vstack([shoulders, dip]))
    canvas.shaded(torso, color, light, 0.40)
    cloth = canvas.mask(torso)
    for side in (-1, 1):
        sleeve = sitter.body(
            [
                (side * 1.12 * build, 2.2),
                (side * 1.16 * build, 3.2),
                (side * 1.20 * build, BELOW),
                (side * 1.09 * build, BELOW),
                (side * 1.07 * build, 3.0),
            ]
        )
        canvas.blend(sleeve, shade_of(color, -0.36), 0.7, 0.03 * sitter.scale, cloth)
    KINDS[sitter.look.clothing](sitter, color, neck, cloth)


def _collar_line(neck: float, drop: float, width: float = 1.0) -> np.ndarray:
    across = np.linspace(-1, 1, 11)
    return np.stack([across * neck * width, 1.30 + drop * (1 - across**2)], -1)


def _tshirt(sitter: Sitter, color: np.ndarray, neck: float, cloth: np.ndarray) -> None:
    opening = _collar_line(neck, 0.34, 1.08)
    sitter.canvas.shaded(sitter.body(opening), shade_of(sitter.skin, -0.10), sitter.light, 0.2)
    rib = np.vstack([opening, (_collar_line(neck, 0.44, 1.26))[::-1]])
    sitter.canvas.fill(sitter.body(rib), shade_of(color, -0.24))


def _shirt(sitter: Sitter, color: np.ndarray, neck: float, cloth: np.ndarray) -> None:
    canvas = sitter.canvas
    canvas.shaded(
        sitter.body([(-neck * 0.9, 1.28), (neck * 0.9, 1.28), (0.0, 1.84)]),
        shade_of(sitter.skin, -0.10),
        sitter.light,
        0.2,
    )
    sitter.line(sitter.body([(0.0, 1.84), (0.0, BELOW)]), shade_of(color, -0.34), 0.03)
    for height in (2.15, 2.6, 3.05):
        canvas.dot(
            sitter.body([(0.07, height)])[0],
            0.045 * sitter.scale,
            shade_of(color, 0.55 if color.mean() < 190 else -0.35),
        )
    for side in (-1, 1):
        flap = [
            (side * neck * 0.98, 1.16),
            (side * neck * 1.36, 1.40),
            (side * 0.42, 1.98),
            (side * 0.02, 1.80),
        ]
        canvas.shaded(sitter.body(flap), shade_of(color, 0.24), sitter.light, 0.25)
        sitter.line(sitter.body([flap[1], flap[2], flap[3]]), shade_of(color, -0.34), 0.025)


def _hoodie(sitter: Sitter, color: np.ndarray, neck: float, cloth: np.ndarray) -> None:
    canvas = sitter.canvas
    hood = np.array(
        [
            (-neck * 1.15, 1.02),
            (-neck * 2.0, 1.28),
            (-neck * 1.9, 1.66),
            (0.0, 2.02),
            (neck * 1.9, 1.66),
            (neck * 2.0, 1.28),
            (neck * 1.15, 1.02),
            (neck * 0.95, 1.40),
            (0.0, 1.70),
            (-neck * 0.95, 1.40),
        ]
    )
    canvas.shaded(smooth_curve(sitter.body(hood), 4), shade_of(color, -0.16), sitter.light, 0.45)
    sitter.line(
        smooth_curve(sitter.body(hood[[1, 2, 3, 4, 5]]), 4, closed=False), shade_of(color, -0.42), 0.03
    )
    cord = shade_of(color, 0.75) if color.mean() < 190 else shade_of(color, -0.45)
    for side in (-1, 1):
        sitter.line(sitter.body([(side * 0.20, 1.82), (side * 0.22, 2.6)]), cord, 0.05)


def _sweater(sitter: Sitter, color: np.ndarray, neck: float, cloth: np.ndarray) -> None:
    canvas = sitter.canvas
    stripe = shade_of(color, 0.62) if color.mean() < 190 else shade_of(color, -0.32)
    for height in (1.98, 2.42, 2.86):
        across = np.linspace(-1.8, 1.8, 9)
        band = np.stack([across, height + 0.10 - 0.05 * across**2], -1)
        canvas.blend(sitter.body(np.vstack([band, (band + [0, 0.15])[::-1]])), stripe, 0.92, 0.0, cloth)
    roll = np.vstack(
        [_collar_line(neck, 0.16, 1.06) - [0, 0.22], (_collar_line(neck, 0.22, 1.22) + [0, 0.08])[::-1]]
    )
    canvas.shaded(sitter.body(roll), shade_of(color, -0.10), sitter.light, 0.4)


def _jacket(sitter: Sitter, color: np.ndarray, neck: float, cloth: np.ndarray) -> None:
    canvas = sitter.canvas
    under = np.array([244.0, 240.0, 232.0]) if color.mean() < 205 else np.array([70.0, 74.0, 90.0])
    inside = [
        (-neck * 1.05, 1.30),
        (neck * 1.05, 1.30),
        (0.46, 2.5),
        (0.42, BELOW),
        (-0.42, BELOW),
        (-0.46, 2.5),
    ]
    canvas.blend(sitter.body(inside), under, 1.0, 0.0, None)
    canvas.shaded(
        sitter.body(_collar_line(neck, 0.26, 1.02)), shade_of(sitter.skin, -0.10), sitter.light, 0.2
    )
    for side in (-1, 1):
        lapel = [
            (side * neck * 1.0, 1.20),
            (side * neck * 1.5, 1.36),
            (side * 0.98, 2.06),
            (side * 0.74, 2.16),
            (side * 0.84, 2.30),
            (side * 0.42, 3.1),
            (side * 0.50, 2.3),
        ]
        canvas.shaded(sitter.body(lapel), shade_of(color, -0.20), sitter.light, 0.35)


KINDS = {"t-shirt": _tshirt, "shirt": _shirt, "hoodie": _hoodie, "sweater": _sweater, "jacket": _jacket}


def draw_hat(sitter: Sitter) -> None:
    """The hat and its shadow on the forehead."""
    if sitter.look.hat != "none":
        HATS[sitter.look.hat](sitter, np.array(CLOTHES_COLORS[sitter.look.hat_color], float))


def _dome(sitter: Sitter, bottom: float, height: float, grow: float, flat: float = 0.0) -> np.ndarray:
    """A crown over the skull above a height: polygon in pixels."""
    head = sitter.head
    top = -sitter.identity["forehead_height"]
    sides = {side: head.rim(side, 0.72 * top, bottom, grow, 6) for side in (-1, 1)}
    width, middle, _ = head.at(0.72 * top)
    arc = np.linspace(0.15, np.pi - 0.15, 11)
    reach = np.sqrt((width * head.cos_yaw) ** 2 + (0.8 * head.sin_yaw) ** 2) + grow
    crown = np.stack(
        [
            reach * np.cos(arc) * (1 + flat * np.sin(arc)),
            0.72 * top - (height + grow) * np.sin(arc) ** (1 - flat),
        ],
        -1,
    )
    return np.vstack([sides[1][::-1], head.upright(crown), sides[-1]])


def _front_edge(sitter: Sitter, v: float, grow: float, curve: float = 0.06) -> np.ndarray:
    """The visible front of a ring around the head, left to right: (N, 2) pixels."""
    head = sitter.head
    width, middle, depth = head.at(v)
    turn = np.linspace(-np.pi, 0, 25) - head.look.yaw
    ring = np.column_stack(
        [(width + grow) * np.cos(turn), np.full(25, v), middle - (depth + grow) * np.sin(turn)]
    )
    pixels = head.pixels(ring)
    pixels[:, 1] += curve * head.scale * np.sin(np.linspace(0, np.pi, 25))
    return pixels


def _hat_shadow(sitter: Sitter, edge: np.ndarray, depth: float) -> None:
    band = np.vstack([edge - [0, 0.05 * sitter.scale], (edge + [0, depth * sitter.scale])[::-1]])
    sitter.soft(band, shade_of(sitter.skin, -0.55), 0.55, 0.04)


def _beanie(sitter: Sitter, color: np.ndarray) -> None:
    canvas, head = sitter.canvas, sitter.head
    edge = _front_edge(sitter, -0.56, 0.10)
    _hat_shadow(sitter, edge, 0.09)
    dome = _dome(sitter, -0.60, 0.62, 0.10)
    canvas.shaded(dome, color, sitter.light, 0.45)
    if sitter.look.detail_seed % 2:
        canvas.shaded(
            head.upright(np.array([0.0, -1.62]) + CIRCLE * 0.19), shade_of(color, 0.45), sitter.light, 0.35
        )
    top_edge = _front_edge(sitter, -0.84, 0.12)
    cuff = np.vstack([top_edge, edge[::-1]])
    canvas.shaded(cuff, shade_of(color, -0.16), sitter.light, 0.4)
    for index in range(2, 24, 2):
        sitter.line(np.array([top_edge[index], edge[index]]), shade_of(color, -0.34), 0.025)


def _cap(sitter: Sitter, color: np.ndarray) -> None:
    canvas, head = sitter.canvas, sitter.head
    edge = _front_edge(sitter, -0.66, 0.08)
    canvas.shaded(np.vstack([_dome(sitter, -0.66, 0.50, 0.09), edge[::-1][:0]]), color, sitter.light, 0.4)
    canvas.shaded(np.vstack([_front_edge(sitter, -0.90, 0.08), edge[::-1]]), color, sitter.light, 0.3)
    turn = np.linspace(-1.25, 1.25, 15)
    width, middle, depth = head.at(-0.62)
    near = np.column_stack(
        [0.98 * width * np.sin(turn), np.full(15, -0.64), middle + (depth + 0.05) * np.cos(turn)]
    )
    far = np.column_stack(
        [
            0.92 * width * np.sin(turn),
            -0.60 + 0.12 * np.cos(turn),
            middle + 0.10 + (depth + 0.48) * np.cos(turn),
        ]
    )
    brim = np.vstack([head.pixels(near), head.pixels(far)[::-1]])
    sitter.soft(brim + [0, 0.12 * sitter.scale], shade_of(sitter.skin, -0.55), 0.55, 0.05)
    canvas.shaded(brim, shade_of(color, -0.30), sitter.light, 0.4)
    sitter.line(head.pixels(far), shade_of(color, -0.48), 0.025)
    badge = head.surface(np.array([0.0, -0.92]) + CIRCLE * [0.15, 0.13], 0.10)
    canvas.blend(badge, shade_of(color, 0.7) if color.mean() < 190 else shade_of(color, -0.5), 0.95)


def _straw_hat(sitter: Sitter, color: np.ndarray) -> None:
    canvas, head = sitter.canvas, sitter.head
    straw = np.array([228.0, 196.0, 132.0])
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    reach = 1.52 * head.width / 0.8 * 0.86
    tilt = -0.20
    ring = np.column_stack(
        [reach * np.cos(turn), -0.70 + tilt * np.sin(turn) * -0.55, reach * 0.98 * np.sin(turn)]
    )
    brim = head.pixels(ring)
    sitter.soft(brim + [0, 0.16 * sitter.scale], shade_of(sitter.skin, -0.55), 0.5, 0.06)
    canvas.shaded(brim, straw, sitter.light, 0.35)
    inner = head.pixels(ring * [0.78, 1, 0.78])
    sitter.line(inner, shade_of(straw, -0.20), 0.02, closed=True)
    canvas.shaded(_dome(sitter, -0.76, 0.44, 0.06, 0.25), shade_of(straw, 0.10), sitter.light, 0.4)
    ribbon = np.vstack([_front_edge(sitter, -0.92, 0.07), _front_edge(sitter, -0.76, 0.08)[::-1]])
    canvas.shaded(ribbon, color, sitter.light, 0.35)


def _headband(sitter: Sitter, color: np.ndarray) -> None:
    band = np.vstack([_front_edge(sitter, -0.90, 0.10), _front_edge(sitter, -0.64, 0.08)[::-1]])
    _hat_shadow(sitter, _front_edge(sitter, -0.64, 0.08), 0.06)
    sitter.canvas.shaded(band, color, sitter.light, 0.4)
    stripe = np.vstack([_front_edge(sitter, -0.81, 0.10), _front_edge(sitter, -0.73, 0.10)[::-1]])
    sitter.canvas.fill(stripe, shade_of(color, 0.7) if color.mean() < 190 else shade_of(color, -0.4))


HATS = {"beanie": _beanie, "cap": _cap, "straw hat": _straw_hat, "headband": _headband}


def draw_glasses(sitter: Sitter) -> None:
    """Frames that follow the head's turn; sunglasses are dark with a gleam."""
    kind = sitter.look.glasses
    if kind == "none":
        return
    head, canvas = sitter.head, sitter.canvas
    frame = np.array(FRAME_COLORS[sitter.look.detail_seed // 7 % len(FRAME_COLORS)], float)
    spacing = max(sitter.identity["eye_spacing"], 0.33)
    middle_v = sitter.identity["eye_height"] + 0.03
    lens_u, lens_v = (0.262, 0.262) if kind == "round" else (0.285, 0.205)
    if kind == "sunglasses":
        frame, lens_u, lens_v = np.array([30.0, 28.0, 34.0]), 0.30, 0.23
    corner = 1.0 if kind == "round" else 0.5
    shape = np.sign(CIRCLE) * np.abs(CIRCLE) ** corner
    stand = 0.16
    _, depth_middle, depth = head.at(middle_v)
    plane = depth_middle + depth * 0.86 + stand

    def on_plane(points: np.ndarray) -> np.ndarray:
        bend = -0.55 * points[:, 0] ** 2
        return head.pixels(np.column_stack([points, plane + bend]))

    for side in (-1, 1):
        hinge = side * (spacing + lens_u)
        if side * head.sin_yaw < 0.25:
            width, middle, _ = head.at(middle_v)
            ear = head.pixels(np.array([(side * width * 1.01, middle_v - 0.02, middle + 0.02)]))
            start = on_plane(np.array([(hinge, middle_v - 0.05)]))
            sitter.line(np.vstack([start, ear]), frame, 0.045)
    for side in (-1, 1):
        lens = on_plane(np.array([side * spacing, middle_v]) + shape * [lens_u, lens_v])
        if kind == "sunglasses":
            canvas.fill(lens, (34, 32, 42))
            gleam = on_plane(np.array([side * spacing - 0.08, middle_v - 0.07]) + CIRCLE * [0.11, 0.05])
            canvas.blend(gleam, (150, 160, 190), 0.5, 0.02 * sitter.scale)
        else:
            gleam = on_plane(np.array([side * spacing - 0.09, middle_v - 0.09]) + CIRCLE * [0.06, 0.05])
            canvas.blend(gleam, (255, 255, 255), 0.28, 0.02 * sitter.scale)
        sitter.line(lens, frame, 0.048, closed=True)
    bridge = np.array(
        [
            (-spacing + lens_u * 0.96, middle_v - 0.04),
            (0.0, middle_v - 0.08),
            (spacing - lens_u * 0.96, middle_v - 0.04),
        ]
    )
    sitter.line(smooth_curve(on_plane(bridge), 4, closed=False), frame, 0.048)
