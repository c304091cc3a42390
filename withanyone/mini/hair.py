"""Hair of a drawn person: what lies behind the head and what lies over it."""

from __future__ import annotations

import cv2
import numpy as np

from .draw import CIRCLE, Sitter, shade_of, smooth_curve

#: style -> (how thick the hair stands on the skull, hairline as heights at the middle, the temples, the ears)
CAPS = {
    "short": (0.07, (-0.66, -0.60, -0.12)),
    "spiky": (0.05, (-0.66, -0.60, -0.16)),
    "bob": (0.11, (-0.50, -0.46, 0.05)),
    "long": (0.09, (-0.84, -0.50, 0.05)),
    "curly": (0.10, (-0.62, -0.56, -0.05)),
    "bun": (0.03, (-0.76, -0.62, -0.16)),
    "ponytail": (0.04, (-0.74, -0.60, -0.12)),
    "braids": (0.05, (-0.84, -0.56, -0.02)),
}


def _drift(sitter: Sitter, depth: float) -> float:
    """Sideways shift (head units) of something ``depth`` behind the head's middle."""
    return -depth * sitter.head.sin_yaw


def draw_back(sitter: Sitter) -> None:
    """Hair behind the head and the shoulders."""
    style, width, head = sitter.look.hair_style, sitter.head.width, sitter.head
    dark = shade_of(sitter.hair, -0.26)
    shift = _drift(sitter, 0.32)
    if style in ("long", "bob"):
        length = 1.85 if style == "long" else 0.92
        half = [
            (0.0, -1.28),
            (0.78 * width, -1.08),
            (1.16 * width, -0.45),
            (1.24 * width, 0.25),
            (1.30 * width, length - 0.25),
            (0.95 * width, length),
        ]
        sitter.canvas.shaded(_mirrored(sitter, half, shift), dark, sitter.light, 0.3)
    elif style == "curly":
        for angle in np.linspace(0.80 * np.pi, 2.20 * np.pi, 11):
            ring = np.array([np.cos(angle) * width * 1.12 + shift, -0.30 + np.sin(angle) * 0.86])
            radius = 0.34 + 0.06 * sitter.rng.random()
            sitter.canvas.shaded(head.upright(ring + CIRCLE * radius), dark, sitter.light, 0.25)
    elif style == "bun" and sitter.look.hat == "none":
        ball = np.array([_drift(sitter, 0.22), -1.38]) + CIRCLE * [0.34, 0.30]
        sitter.canvas.shaded(head.upright(ball), sitter.hair, sitter.light, 0.42)
        for bend in (-0.4, 0.1, 0.5):
            arc = np.array(
                [
                    (-0.24 + 0.1 * bend, -1.46 + 0.1 * bend),
                    (0.0, -1.60 + 0.22 * (bend + 0.4)),
                    (0.24, -1.44 + 0.1 * bend),
                ]
            )
            arc[:, 0] += _drift(sitter, 0.22)
            sitter.line(smooth_curve(head.upright(arc), 4, closed=False), shade_of(sitter.hair, -0.3), 0.025)
    elif style == "ponytail":
        side = -1 if sitter.look.yaw > 0 else 1
        if abs(sitter.look.yaw) < 0.12:
            side = 1 if sitter.look.detail_seed % 2 else -1
        tail = np.array(
            [
                (0.45, -0.95),
                (0.95, -1.12),
                (1.36, -0.70),
                (1.46, 0.10),
                (1.26, 0.85),
                (1.12, 0.30),
                (0.98, -0.30),
                (0.70, -0.62),
            ]
        )
        tail = tail * [side * width / 0.8, 1]
        sitter.canvas.shaded(
            smooth_curve(head.upright(tail), 4), shade_of(sitter.hair, -0.08), sitter.light, 0.4
        )
        tie = np.array([side * 0.80 * width / 0.8, -0.92]) + CIRCLE * [0.10, 0.13]
        sitter.canvas.fill(head.upright(tie), (226, 84, 96))


def _mirrored(sitter: Sitter, half: list[tuple[float, float]], shift: float) -> np.ndarray:
    """A closed smooth shape from its right half, shifted sideways."""
    right = np.array(half)
    both = np.vstack([right, (right[1:] * [-1, 1])[::-1]]) + [shift, 0]
    return sitter.head.upright(smooth_curve(both, 4))


def _cap(sitter: Sitter, thickness: float, line: tuple[float, float, float]) -> np.ndarray:
    """Hair lying on the skull from the outline down to the hairline: polygon in pixels."""
    head, trait = sitter.head, sitter.identity
    middle, temples, ears = line
    top = -trait["forehead_height"]
    turned = np.clip(abs(head.sin_yaw) * 1.1, 0, 1)
    low = {side: ears + (0.42 * turned if side == sitter.near_side() else -0.05 * turned) for side in (-1, 1)}
    heart = head.pixels(np.array([(0.0, -0.20, -0.03)]))
    right, left = (
        heart + (head.rim(side, top, low[side], 0.0, 18) - heart) * (1 + thickness) for side in (1, -1)
    )
    width = head.width
    offset = 0.30 if sitter.look.detail_seed % 2 else -0.30
    parted = sitter.look.hair_style in ("short", "long", "braids")
    peak = np.array([(offset if parted else 0.0) * width, middle])
    front = np.array(
        [
            (-0.97 * width, ears),
            (-0.86 * width, temples),
            (-0.50 * width + 0.3 * peak[0], 0.35 * temples + 0.65 * middle - 0.01),
            tuple(peak),
            (0.50 * width + 0.3 * peak[0], 0.35 * temples + 0.65 * middle - 0.01),
            (0.86 * width, temples),
            (0.97 * width, ears),
        ]
    )
    hairline = smooth_curve(head.surface(front), 4, closed=False)
    near = sitter.near_side()
    nape = head.pixels(np.array([(near * width * 0.98, low[near], 0.0)]))
    ends = (nape, hairline[:0]) if near > 0 else (hairline[:0], nape)
    return np.vstack([left[::-1], right, ends[0], hairline[::-1], ends[1]])


def draw_front(sitter: Sitter) -> None:
    """Hair over the head, and the shadow it throws on the forehead."""
    style, head, canvas, scale = sitter.look.hair_style, sitter.head, sitter.canvas, sitter.scale
    color = sitter.hair
    if style == "bald":
        shine = head.surface(np.array([0.16 * np.sign(sitter.light.x), -0.86]) + CIRCLE * [0.22, 0.09])
        sitter.soft(shine, shade_of(sitter.skin, 0.6), 0.4, 0.06)
        return
    if style == "mohawk":
        _mohawk(sitter, color)
        return
    thickness, line = CAPS[style]
    if sitter.look.hat not in ("none", "headband"):
        thickness = min(thickness, 0.04)
    cap = _cap(sitter, thickness, line)
    sitter.soft(cap + [0, 0.07 * scale], shade_of(sitter.skin, -0.5), 0.45, 0.035)
    if style == "spiky":
        _spikes(sitter, color)
    canvas.shaded(cap, color, sitter.light, 0.42)
    if style == "curly":
        _curls(sitter, color)
    elif style in ("long", "bob"):
        _locks(sitter, color, 1.62 if style == "long" else 0.86)
    elif style == "braids":
        _braids(sitter, color)
    if style != "curly":
        _strands(sitter, color, canvas.mask(cap))


def _strands(sitter: Sitter, color: np.ndarray, clip: np.ndarray) -> None:
    """A soft band of shine across the crown and a few combed lines."""
    head, scale = sitter.head, sitter.scale
    top = -sitter.identity["forehead_height"]
    width = head.width
    lean = 0.25 * np.sign(sitter.light.x)
    across = np.linspace(-0.62, 0.62, 9)
    band = np.stack([across * width + lean * width * 0.6, 0.80 * top + 0.16 * across**2], -1)
    shape = np.vstack([band - [0, 0.035], (band + [0, 0.05 * 1.0])[::-1]])
    sitter.canvas.blend(head.surface(shape), shade_of(color, 0.42), 0.5, 0.03 * scale, clip)
    for u in sitter.rng.uniform(-0.75, 0.75, 5):
        strand = np.array([(u * 0.5, 0.93 * top), (u * 0.85, 0.72 * top), (u * 1.0, 0.52 * top)]) * [width, 1]
        points = head.surface(smooth_curve(strand, 3, closed=False))
        edge = np.vstack([points, points[::-1] + [0.028 * scale, 0]])
        sitter.canvas.blend(edge, shade_of(color, -0.28), 0.6, 0.008 * scale, clip)


def _spikes(sitter: Sitter, color: np.ndarray) -> None:
    if sitter.look.hat != "none":
        return
    head, top, width = sitter.head, -sitter.identity["forehead_height"], sitter.head.width
    shift = _drift(sitter, 0.1)
    for angle in np.linspace(-1.25, 1.25, 9):
        root = np.array([np.sin(angle) * width * 0.98, -0.25 + (top + 0.22) * np.cos(angle) * 0.92])
        away = np.array([np.sin(angle), -np.cos(angle)])
        across = np.array([np.cos(angle), np.sin(angle)])
        length = 0.40 + 0.10 * sitter.rng.random()
        spike = np.array(
            [root - across * 0.19 - away * 0.15, root + away * length, root + across * 0.19 - away * 0.15]
        )
        sitter.canvas.shaded(head.upright(spike + [shift, 0]), color, sitter.light, 0.4)


def _curls(sitter: Sitter, color: np.ndarray) -> None:
    head, width = sitter.head, sitter.head.width
    covered = sitter.look.hat not in ("none", "headband")
    shift = _drift(sitter, 0.05)
    angles = np.linspace(1.0 * np.pi, 2.0 * np.pi, 10)
    for index, angle in enumerate(angles):
        if covered and 1 < index < 8:
            continue
        middle = np.array([np.cos(angle) * width * 1.0 + shift, -0.48 + np.sin(angle) * 0.60])
        radius = 0.25 + 0.05 * sitter.rng.random()
        sitter.canvas.shaded(head.upright(middle + CIRCLE * radius), color, sitter.light, 0.4)
        arc = middle + CIRCLE[14:26] * radius * 0.55
        sitter.line(head.upright(arc), shade_of(color, 0.22), 0.03)


def _locks(sitter: Sitter, color: np.ndarray, length: float) -> None:
    """Curtains of hair beside the face."""
    head, width = sitter.head, sitter.head.width
    for side in (-1, 1):
        far = side * head.sin_yaw > 0
        reach = (
            0.16 * (1 - 0.75 * min(1.0, abs(head.sin_yaw) * 1.6)) if far else 0.16 + 0.10 * abs(head.sin_yaw)
        )
        temple = head.rim(side, -0.62, 0.15, 0.07, 5)
        outer = head.upright(
            np.array(
                [
                    (side * 1.20 * width + _drift(sitter, 0.30), 0.45),
                    (side * 1.22 * width + _drift(sitter, 0.34), length),
                ]
            )
        )
        inner_u = side * (1.22 * width - reach - 0.14)
        inner = head.upright(
            np.array([(inner_u + _drift(sitter, 0.34), length), (inner_u + _drift(sitter, 0.22), 0.75)])
        )
        cheek = head.surface(
            np.array(
                [(side * (0.97 * width), 0.20), (side * 0.93 * width, -0.30), (side * 0.80 * width, -0.55)]
            )
        )
        shape = smooth_curve(np.vstack([temple, outer, inner, cheek]), 3)
        sitter.canvas.shaded(shape, shade_of(color, -0.04), sitter.light, 0.4)


def _braids(sitter: Sitter, color: np.ndarray) -> None:
    head, width = sitter.head, sitter.head.width
    for side in (-1, 1):
        shift = _drift(sitter, 0.25)
        for knot in range(6):
            middle = np.array([side * (1.06 * width - 0.015 * knot) + shift, 0.22 + 0.25 * knot])
            radius = np.array([0.165 - 0.012 * knot, 0.175])
            sitter.canvas.shaded(head.upright(middle + CIRCLE * radius), color, sitter.light, 0.5)
            mark = np.array([middle + [-0.10, -0.08], middle + [0.02, 0.07], middle + [0.11, -0.06]])
            sitter.line(head.upright(mark), shade_of(color, -0.42), 0.025)
        end = np.array([side * (1.06 * width - 0.08) + shift, 1.66]) + CIRCLE * [0.08, 0.07]
        sitter.canvas.fill(head.upright(end), (232, 92, 104))


def _mohawk(sitter: Sitter, color: np.ndarray) -> None:
    head, top = sitter.head, -sitter.identity["forehead_height"]
    stubble = _cap(sitter, 0.0, (-0.70, -0.60, -0.14))
    sitter.soft(stubble, 0.55 * sitter.skin + 0.35 * color, 0.40, 0.03)
    # a crest from the forehead over the crown: a dark sheet, the near flank lit, a few strands
    turn = np.linspace(0.45, 2.2, 14)
    ridge_v, ridge_z = -0.16 + (top + 0.18) * np.sin(turn), 0.80 * np.cos(turn)
    height = 0.46 * np.sin(np.linspace(0.35, np.pi - 0.5, 14)) ** 0.7
    tip_v, tip_z = ridge_v - height * np.sin(turn), ridge_z + height * np.cos(turn) * 0.5

    def flank(base: float, crown: float) -> np.ndarray:
        low = head.pixels(np.column_stack([np.full(14, base), ridge_v + 0.04, ridge_z]))
        high = head.pixels(np.column_stack([np.full(14, crown), tip_v, tip_z]))
        return np.vstack([low, high[::-1]])

    near = sitter.near_side()
    face_on = np.vstack([flank(0.21, 0.10)[:14], flank(-0.21, -0.10)[:14][::-1]])
    crown = np.vstack([flank(0.21, 0.10)[14:], flank(-0.21, -0.10)[14:][::-1]])
    front = head.pixels(
        np.array(
            [
                (-0.21, ridge_v[0] + 0.04, ridge_z[0]),
                (-0.10, tip_v[0], tip_z[0]),
                (0.10, tip_v[0], tip_z[0]),
                (0.21, ridge_v[0] + 0.04, ridge_z[0]),
            ]
        )
    )
    sheet = np.vstack([flank(0.21, 0.10), flank(-0.21, -0.10)])
    sitter.canvas.shaded(
        cv2.convexHull(np.vstack([face_on, crown, sheet]).astype(np.float32))[:, 0].astype(float),
        shade_of(color, -0.10),
        sitter.light,
        0.4,
    )
    sitter.canvas.shaded(flank(-near * -0.21, near * 0.10), color, sitter.light, 0.35)
    sitter.canvas.shaded(front, shade_of(color, 0.10), sitter.light, 0.2)
    for index in (3, 5, 7):
        strand = np.array(
            [(near * 0.19, ridge_v[index], ridge_z[index]), (near * 0.12, tip_v[index] + 0.06, tip_z[index])]
        )
        sitter.line(head.pixels(strand), shade_of(color, -0.30), 0.022)
