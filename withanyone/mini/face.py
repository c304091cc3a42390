"""The face of a drawn person: skull, ears, eyes, brows, nose, mouth, marks, beard, and the light on them."""

from __future__ import annotations

import cv2
import numpy as np

from .draw import CIRCLE, HAIR_COLORS, Sitter, shade_of, smooth_curve

#: expression -> (eye opening, lift of the brows, lift of their inner ends)
UPPER_FACE = {
    "neutral": (1.00, 0.00, 0.00),
    "smiling": (0.82, 0.01, 0.00),
    "laughing": (0.50, 0.03, 0.02),
    "surprised": (1.38, 0.10, 0.02),
    "sad": (0.82, 0.01, 0.12),
    "angry": (0.80, -0.05, -0.13),
}


def draw_face(sitter: Sitter) -> None:
    """Everything that belongs to the face, then one pass of light over it."""
    head, canvas = sitter.head, sitter.canvas
    _ear(sitter, -sitter.near_side())
    outline = head.outline()
    canvas.fill(outline, sitter.skin)
    _nose_silhouette(sitter)
    sitter.face_mask = canvas.mask(outline)
    _complexion(sitter)
    _marks(sitter)
    for side in (-1, 1):
        _eye(sitter, side)
        _brow(sitter, side)
    _beard(sitter)
    _mouth(sitter)
    _nose(sitter)
    _light(sitter, outline)
    for side in (-1, 1):
        _glint(sitter, side)
    _ear(sitter, sitter.near_side())


def ear_visible(sitter: Sitter, side: int) -> bool:
    """The far ear disappears behind the cheek as the head turns."""
    return side * sitter.head.sin_yaw < 0.3


def _ear(sitter: Sitter, side: int) -> None:
    if not ear_visible(sitter, side):
        return
    head, trait, size = sitter.head, sitter.identity, sitter.identity["ear_size"]
    width, middle, _ = head.at(trait["ear_height"])
    out = trait["ear_out"] + 0.25 * size
    lobe = 1 + 0.35 * trait["ear_lobe"]
    shape = np.array(
        [
            (0, -1.15),
            (0.62, -1.0),
            (0.78, -0.35),
            (0.5, 0.35),
            (0.3, 0.95 * lobe),
            (-0.1, 0.9 * lobe),
            (-0.2, 0),
        ]
    )

    def place(points: np.ndarray) -> np.ndarray:
        u = side * (width + 0.01 + points[:, 0] * out)
        z = middle - 0.02 - points[:, 0] * 1.1 * size
        return head.pixels(np.column_stack([u, trait["ear_height"] + points[:, 1] * size, z]))

    contour = smooth_curve(place(shape), 4)
    sitter.canvas.shaded(contour, shade_of(sitter.skin, -0.07), sitter.light, 0.25)
    inner = smooth_curve(place(shape * [0.62, 0.66] + [0.08, -0.05]), 4)
    sitter.canvas.blend(inner, shade_of(sitter.skin, -0.32), 0.75, 0.02 * sitter.scale)


def _complexion(sitter: Sitter) -> None:
    """Soft colour of the skin: blush, eye sockets, hollow cheeks, shadows under nose and lip."""
    head, trait, skin = sitter.head, sitter.identity, sitter.skin
    blush = shade_of(skin, -0.06) * [1.06, 0.80, 0.80] + [10, 0, 4]
    made_up = sitter.look.makeup != "none"
    strength = 0.28 + 0.25 * trait["skin_rosiness"] + (0.2 if made_up else 0.0)
    smiling = sitter.look.expression in ("smiling", "laughing")
    for side in (-1, 1):
        eye_u, eye_v = head.eye(side)
        cheek = np.array([side * 0.47, 0.30 - (0.05 if smiling else 0.0)]) + CIRCLE * [0.17, 0.13]
        sitter.soft(head.surface(cheek), blush, strength, 0.07)
        if smiling or trait["cheek_fullness"] > 0:
            fullness = 0.14 + 0.16 * max(trait["cheek_fullness"], 0.3 if smiling else 0.0)
            apple = np.array([side * 0.45, 0.20]) + CIRCLE * [0.12, 0.07]
            sitter.soft(head.surface(apple), shade_of(skin, 0.30), fullness, 0.05)
        socket = np.array([eye_u, eye_v - 0.05]) + CIRCLE * [trait["eye_width"] * 1.25, 0.15]
        sitter.soft(head.surface(socket), shade_of(skin, -0.38), 0.16 + 0.34 * trait["eye_depth"], 0.05)
        if trait["hollow_cheeks"]:
            hollow = np.array([side * 0.56, 0.46]) + CIRCLE * [0.09, 0.20]
            sitter.soft(head.surface(hollow), shade_of(skin, -0.34), 0.5 * trait["hollow_cheeks"], 0.06)
    mouth = head.mouth()
    below = np.array([0, mouth.height + mouth.opening * 0.78 + mouth.lower + 0.075]) + CIRCLE * [0.17, 0.035]
    sitter.soft(head.surface(below), shade_of(skin, -0.34), 0.55, 0.03)
    chin = np.array([0, 0.93 + trait["chin_length"] + head.jaw_drop]) + CIRCLE * [
        trait["chin_width"] * 0.6,
        0.08,
    ]
    sitter.soft(head.surface(chin), shade_of(skin, 0.22), 0.35, 0.05)


def _marks(sitter: Sitter) -> None:
    """Freckles, moles, a scar, lines and folds."""
    head, trait, skin = sitter.head, sitter.identity, sitter.skin
    smiling = sitter.look.expression in ("smiling", "laughing")
    crease = shade_of(skin, -0.36)
    for u, v in sitter.identity.freckle_spots:
        spot = head.surface(np.array([(0.50 * u, 0.20 + 0.17 * v)]))[0]
        sitter.canvas.blend(
            spot + CIRCLE * 0.022 * sitter.scale, skin * [0.74, 0.60, 0.50], 0.45 + 0.4 * trait["freckles"]
        )
    for number in range(3 if trait["forehead_lines"] else 0):
        across = np.linspace(-0.42, 0.42, 9) * (1 - 0.12 * number)
        v = -0.52 - 0.10 * number + 0.05 * across**2
        _groove(sitter, np.stack([across, v], -1), 0.016, 0.75 * trait["forehead_lines"])
    for side in (-1, 1):
        eye_u, eye_v = head.eye(side)
        if trait["eye_bags"]:
            across = np.linspace(-0.85, 0.85, 7)
            v = eye_v + trait["eye_width"] * trait["eye_opening"] + 0.075 + 0.035 * (1 - across**2)
            bag = np.stack([eye_u + across * trait["eye_width"], v], -1)
            _groove(sitter, bag, 0.022, 0.8 * trait["eye_bags"])
        if trait["crows_feet"]:
            start = np.array([eye_u + side * (trait["eye_width"] + 0.05), eye_v])
            for slope in (-0.07, 0.0, 0.07):
                end = start + [side * 0.10, slope]
                _groove(sitter, np.array([start + [0, slope * 0.3], end]), 0.014, 0.85 * trait["crows_feet"])
        mouth = head.mouth()
        fold = max(trait["smile_folds"], 0.45 if smiling else 0.0)
        if fold:
            tip_v = trait["eye_height"] + trait["nose_length"]
            out = mouth.half_width + 0.06
            points = [
                (side * (trait["nose_width"] + 0.05), tip_v - 0.02),
                (side * (out + 0.01), tip_v + 0.12),
                (side * (out + 0.03), mouth.height),
            ]
            _groove(sitter, smooth_curve(np.array(points), 4, closed=False), 0.02, 0.7 * fold)
        if trait["cheek_dimples"]:
            u = side * (mouth.half_width + 0.12)
            dimple = head.surface(
                np.array([(u, mouth.height - 0.05), (u + side * 0.02, mouth.height + 0.05)])
            )
            sitter.line(dimple, crease, 0.022)
    if trait["chin_dimple"]:
        v = 0.90 + trait["chin_length"] + head.jaw_drop
        sitter.soft(
            head.surface(np.array([0, v + 0.03]) + CIRCLE * [0.02, 0.06]),
            crease,
            0.9 * trait["chin_dimple"],
            0.012,
        )
    for u, v, radius in sitter.identity.moles:
        sitter.canvas.dot(
            head.surface(np.array([(u, v)]))[0], radius * sitter.scale, skin * [0.42, 0.34, 0.30]
        )
    if sitter.identity.scar is not None:
        u, v, slope = sitter.identity.scar
        line = head.surface(
            np.array([(u - 0.09, v - 0.11 * slope), (u, v + 0.01), (u + 0.09, v + 0.11 * slope)])
        )
        sitter.line(line, shade_of(skin, 0.35) * [1.0, 0.90, 0.90], 0.03)


def _groove(sitter: Sitter, points: np.ndarray, width: float, alpha: float) -> None:
    """A soft line in the skin: a thin polygon around a curve of (u, v), thickest in the middle."""
    half = width * np.sin(np.linspace(0.15, np.pi - 0.15, len(points)))[:, None] * [0.35, 1.0]
    around = np.vstack([points - half, (points + half)[::-1]])
    sitter.soft(sitter.head.surface(around), shade_of(sitter.skin, -0.48), min(1.0, alpha), 0.008)


def _eye_curves(sitter: Sitter, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower lid of an eye from its inner to its outer corner: two (11, 2) of (u, v)."""
    trait = sitter.identity
    eye_u, eye_v = sitter.head.eye(side)
    opening = trait["eye_width"] * trait["eye_opening"] * UPPER_FACE[sitter.look.expression][0]
    along = np.linspace(-1, 1, 11)  # -1 is the corner at the nose
    u = eye_u + side * along * trait["eye_width"]
    tilt = -trait["eye_tilt"] * along * trait["eye_width"]
    upper = eye_v + tilt - opening * 1.12 * (1 - along**2) ** 0.75
    lower = eye_v + tilt + opening * 0.72 * (1 - along**2) ** 0.9
    if sitter.look.expression == "laughing":
        lower -= 0.45 * opening * (1 - along**2)
    return np.stack([u, upper], -1), np.stack([u, lower], -1)


def _iris_center(sitter: Sitter, side: int) -> np.ndarray:
    eye_u, eye_v = sitter.head.eye(side)
    drift = 0.30 * sitter.look.gaze * sitter.identity["eye_width"]
    return np.array([eye_u + drift, eye_v - 0.018])


def _eye(sitter: Sitter, side: int) -> None:
    head, canvas, trait, scale = sitter.head, sitter.canvas, sitter.identity, sitter.scale
    upper, lower = _eye_curves(sitter, side)
    made_up = sitter.look.makeup != "none"
    if made_up:
        lid = np.vstack([upper, (upper - [0, 0.09])[::-1]])
        tint = np.array([(150, 90, 160), (90, 110, 180), (190, 100, 110)][sitter.look.detail_seed % 3], float)
        sitter.soft(head.surface(lid), 0.45 * tint + 0.55 * sitter.skin * 0.8, 0.75, 0.02)
    contour = head.surface(np.vstack([upper, lower[::-1]]))
    opening = cv2.min(canvas.mask(contour), sitter.face_mask)
    white = np.array([246.0, 244.0, 240.0]) * 0.985
    canvas.blend(contour, white, 1.0, 0.0, sitter.face_mask)
    middle, radius = _iris_center(sitter, side), trait["iris_size"]
    iris = np.array(sitter.identity.iris)
    for size, color in ((1.0, iris * 0.45), (0.84, iris), (0.46, (18, 15, 16))):
        canvas.blend(head.surface(middle + CIRCLE * radius * size), color, 1.0, 0.0, opening)
    glow = head.surface(middle + [0, 0.45 * radius] + CIRCLE * radius * [0.5, 0.28])
    canvas.blend(glow, np.clip(iris * 1.45 + 25, 0, 255), 0.6, 0.012 * scale, opening)
    lid_shadow = np.vstack([upper - [0, 0.02], (upper + [0, 0.05])[::-1]])
    canvas.blend(head.surface(lid_shadow), (70, 56, 66), 0.42, 0.012 * scale, opening)
    lash = np.minimum(sitter.skin * 0.28, 46)
    thickness = 0.022 + 0.022 * trait["lash"] + (0.016 if made_up else 0.0)
    thick = thickness * np.linspace(0.55, 1.25, len(upper))[:, None] * [0, 1]
    flick = np.array([[side * 0.035, -0.02 - 0.02 * trait["lash"]]])
    lid_line = np.vstack([upper - thick, upper[-1:] + flick, (upper + thick * 0.25)[::-1]])
    canvas.blend(head.surface(lid_line), lash, 1.0, 0.0, sitter.face_mask)
    sitter.line(head.surface(lower[2:]), shade_of(sitter.skin, -0.42), 0.014)
    crease = upper - [0, 0.045 + 0.055 * trait["lid_crease"]]
    sitter.line(head.surface(crease[1:-1]), shade_of(sitter.skin, -0.20 - 0.22 * trait["lid_crease"]), 0.016)


def _glint(sitter: Sitter, side: int) -> None:
    """The light's reflection in an eye, drawn after shading so that it sparkles."""
    upper, lower = _eye_curves(sitter, side)
    opening = sitter.canvas.mask(sitter.head.surface(np.vstack([upper, lower[::-1]])))
    radius = sitter.identity["iris_size"]
    direction = 1 if sitter.light.x > 0 else -1
    spot = _iris_center(sitter, side) + np.array([direction * 0.34, -0.34]) * radius
    sitter.canvas.blend(
        sitter.head.surface(spot + CIRCLE * radius * 0.30), (255, 255, 255), 0.95, 0.0, opening
    )


def _brow(sitter: Sitter, side: int) -> None:
    head, trait = sitter.head, sitter.identity
    eye_u, eye_v = head.eye(side)
    _, lift, inner_lift = UPPER_FACE[sitter.look.expression]
    along = np.linspace(-1, 1, 9)
    u = eye_u + side * (trait["brow_gap"] + 0.02 + along * trait["brow_length"])
    middle = eye_v - trait["brow_height"] - lift
    arch = -0.085 * trait["brow_arch"] * (1 - ((along - 0.25) / 1.25) ** 2)
    tilt = -0.26 * trait["brow_tilt"] * along - inner_lift * np.clip(0.5 - along, 0, None) * 0.75
    taper = 1 - (0.35 + 0.45 * trait["brow_taper"]) * np.clip(along, 0, 1) ** 1.5
    half = 0.5 * trait["brow_thickness"] * taper * np.sqrt(np.clip(1.06 - along**6, 0.08, 1))
    v = middle + arch + tilt
    shape = np.vstack([np.stack([u, v - half], -1), np.stack([u, v + half], -1)[::-1]])
    sitter.soft(head.surface(shape), np.array(sitter.identity.brows), 0.95, 0.008)


def _nose_outline(sitter: Sitter) -> tuple[np.ndarray, np.ndarray]:
    """The ridge of the nose, down to its tip: (u, v) (7, 2), and how far it stands out (7,)."""
    trait = sitter.identity
    share = np.linspace(0, 1, 7)
    top = trait["eye_height"] - 0.04
    bend = trait["nose_asymmetry"] * np.sin(np.pi * 0.5 * share)
    v = top + share * (trait["nose_length"] + 0.03)
    lift = trait["nose_lift"] * share**1.25 + trait["nose_hump"] * np.sin(np.pi * np.clip(share * 1.35, 0, 1))
    return np.stack([bend, v], -1), np.maximum(lift, 0.0)


def _nose_silhouette(sitter: Sitter) -> None:
    """At strong yaw the nose may stand out beyond the cheek."""
    head, trait = sitter.head, sitter.identity
    ridge, lift = _nose_outline(sitter)
    base = np.array([(-trait["nose_width"] * 0.5, ridge[-1, 1] + 0.05), (0.0, ridge[0, 1])])
    shape = np.vstack([head.surface(ridge, lift), head.surface(base, 0.02)])
    sitter.canvas.fill(shape, sitter.skin)


def _nose(sitter: Sitter) -> None:
    head, canvas, trait, skin, scale = sitter.head, sitter.canvas, sitter.identity, sitter.skin, sitter.scale
    ridge, lift = _nose_outline(sitter)
    tip_u, tip_v = trait["nose_asymmetry"], trait["eye_height"] + trait["nose_length"]
    wing, bridge, stand = trait["nose_width"], trait["nose_bridge"], trait["nose_lift"]
    turn = trait["nose_turn"]
    shadow = shade_of(skin, -0.34)
    dark_side = -1 if sitter.light.x > 0 else 1
    if abs(sitter.look.yaw) > 0.2:
        dark_side = -sitter.near_side()
    edge = np.array(
        [
            (dark_side * bridge, ridge[0, 1] - 0.02),
            (dark_side * bridge * 1.05, ridge[3, 1]),
            (tip_u + dark_side * wing * 0.95, tip_v),
        ]
    )
    flank = np.vstack([head.surface(ridge, lift), head.surface(edge[::-1], 0.03)])
    canvas.blend(flank, shadow, 0.55, 0.02 * scale)
    # the ball and wings of the nose
    ball = 0.055 + 0.045 * trait["nose_tip"]
    underside = np.array(
        [
            (tip_u - wing, tip_v - 0.005),
            (tip_u - wing * 0.6, tip_v + 0.055),
            (tip_u, tip_v + 0.065 - 0.03 * turn),
            (tip_u + wing * 0.6, tip_v + 0.055),
            (tip_u + wing, tip_v - 0.005),
            (tip_u, tip_v - 0.03),
        ]
    )
    raised = np.array([0.03, 0.10, stand * 0.75, 0.10, 0.03, stand * 0.8])
    canvas.blend(smooth_curve(head.surface(underside, raised), 4), shadow, 0.5, 0.014 * scale)
    for side in (-1, 1):
        nostril = np.array([tip_u + side * wing * 0.48, tip_v + 0.035 - 0.012 * turn]) + CIRCLE * [
            0.028 + 0.10 * wing,
            0.020 + 0.012 * turn,
        ]
        canvas.blend(head.surface(nostril, stand * 0.38), skin * [0.40, 0.30, 0.30], 0.75, 0.008 * scale)
        curve = np.array(
            [
                (tip_u + side * wing * 0.86, tip_v - 0.085),
                (tip_u + side * wing * 1.06, tip_v - 0.015),
                (tip_u + side * wing * 0.82, tip_v + 0.05),
            ]
        )
        if side * head.sin_yaw < 0.45:
            sitter.line(
                smooth_curve(head.surface(curve, 0.05), 4, closed=False), shade_of(skin, -0.36), 0.020
            )
    if abs(sitter.look.yaw) > 0.2:
        sitter.line(
            smooth_curve(head.surface(ridge, lift), 3, closed=False)[6:], shade_of(skin, -0.30), 0.018
        )
    shine = shade_of(skin, 0.34)
    near = np.array([-0.02 * np.sign(head.sin_yaw), 0.0])
    band = np.vstack([ridge[1:6] + near - [bridge * 0.35, 0], (ridge[1:6] + near + [bridge * 0.35, 0])[::-1]])
    canvas.blend(head.surface(band, np.concatenate([lift[1:6], lift[1:6][::-1]])), shine, 0.5, 0.022 * scale)
    tip = np.array([tip_u, tip_v - 0.045 - 0.03 * turn]) + near + CIRCLE * ball * 0.8
    canvas.blend(head.surface(tip, stand), shine, 0.55, 0.026 * scale)


def _mouth(sitter: Sitter) -> None:
    head, canvas, scale = sitter.head, sitter.canvas, sitter.scale
    mouth = head.mouth()
    upper, lower = mouth.upper_line(), mouth.lower_line()
    lips = np.array(sitter.identity.lips)
    if sitter.look.makeup == "lipstick":
        tones = ((202, 30, 56), (176, 26, 84), (214, 60, 70))
        lips = np.array(tones[sitter.look.detail_seed // 3 % 3], float)
    if mouth.opening > 0:
        inside = head.surface(np.vstack([upper, lower[::-1]]), 0.02)
        canvas.fill(inside, (88, 26, 34))
        hole = canvas.mask(inside)
        if sitter.look.expression == "laughing":
            teeth = np.vstack([upper, (upper + 0.42 * (lower - upper))[::-1]])
            canvas.blend(head.surface(teeth, 0.02), (250, 248, 243), 1.0, 0.0, hole)
            tongue = np.array([0, mouth.height + mouth.opening * 0.72]) + CIRCLE * [
                mouth.half_width * 0.55,
                0.07,
            ]
            canvas.blend(head.surface(tongue, 0.02), (212, 96, 104), 0.9, 0.01 * scale, hole)
        if sitter.look.expression == "angry":
            canvas.blend(inside, (244, 240, 234), 0.95, 0.0, hole)
    canvas.blend(
        head.surface(np.vstack([mouth.upper_edge(), upper[::-1]]), 0.03), lips * 0.88, 0.95, 0.006 * scale
    )
    canvas.blend(head.surface(np.vstack([lower, mouth.lower_edge()[::-1]]), 0.04), lips, 0.95, 0.006 * scale)
    gloss = np.array([0, mouth.lower_edge()[7, 1] - 0.55 * mouth.lower]) + CIRCLE * [
        mouth.half_width * 0.32,
        mouth.lower * 0.22,
    ]
    canvas.blend(head.surface(gloss, 0.04), shade_of(lips, 0.42), 0.6, 0.012 * scale)
    line = lips * 0.48
    sitter.line(head.surface(upper, 0.04), line, 0.018)
    if mouth.opening > 0:
        sitter.line(head.surface(lower, 0.04), line * 1.2, 0.014)
    for corner in mouth.corners():
        spot = head.surface(corner + CIRCLE * 0.022, 0.03)
        canvas.blend(spot, line, 0.6, 0.012 * scale)


def beard_color(sitter: Sitter) -> np.ndarray:
    """The hair's colour where that is natural, else the brows'."""
    natural = sitter.look.hair_style != "bald" and sitter.look.hair_color not in ("blue", "pink")
    return np.array(HAIR_COLORS[sitter.look.hair_color] if natural else sitter.identity.brows, float) * 0.92


def _beard(sitter: Sitter) -> None:
    kind = sitter.look.beard
    if kind == "none":
        return
    head, trait = sitter.head, sitter.identity
    mouth = head.mouth()
    color = beard_color(sitter)
    tip_v = trait["eye_height"] + trait["nose_length"]
    half = mouth.half_width
    moustache = np.array(
        [
            (0.0, tip_v + 0.085),
            (half * 0.5, tip_v + 0.10),
            (half * 0.95, mouth.height - 0.075),
            (half * 1.12, mouth.height + 0.035),
            (half * 0.55, mouth.upper_edge()[7, 1] + 0.015),
            (0.0, mouth.upper_edge()[7, 1] + 0.01),
        ]
    )
    moustache = np.vstack([moustache, (moustache[1:-1] * [-1, 1])[::-1]])
    patch = head.surface(smooth_curve(moustache, 4), 0.035)
    if kind in ("moustache", "beard"):
        sitter.soft(patch, color, 0.96, 0.012)
        sitter.soft(
            head.surface(smooth_curve(moustache * [0.8, 1] - [0, 0.015], 3), 0.035),
            shade_of(color, 0.16),
            0.45,
            0.02,
        )
    if kind == "moustache":
        return
    v = np.linspace(0.05, 1.25, 13)
    width, _, _ = head.at(v)
    outer = np.stack([width * 1.1 + 0.05, v], -1)
    chin = head.sections[-1, 0]
    inner = np.array(
        [
            (0.0, mouth.lower_edge()[7, 1] + 0.06),
            (half * 0.8, mouth.height + 0.13),
            (half + 0.10, mouth.height - 0.03),
            (0.66 * head.width, 0.47),
            (0.88 * head.width, 0.22),
            (0.93 * head.width, 0.05),
        ]
    )
    inner = smooth_curve(inner, 4, closed=False)
    right = np.vstack([inner, outer[v <= chin + 0.05]])
    below = [(0.0, chin + 0.3)]
    region = np.vstack([right, below, (right * [-1, 1])[::-1]])
    points = _skin_or_rim(sitter, region)
    if kind == "stubble":
        sitter.soft(points, shade_of(color, -0.1), 0.46, 0.045)
        sitter.soft(patch, shade_of(color, -0.1), 0.46, 0.03)
        return
    sitter.soft(points, color, 0.96, 0.022)
    for u in np.linspace(-0.5, 0.5, 9):
        top = max(0.60 + 0.3 * (0.5 - abs(u)), mouth.lower_edge()[7, 1] + 0.1 if abs(u) < half else 0.5)
        strand = np.array([(u - 0.016, top), (u * 0.96, top + 0.24), (u + 0.016, top)])
        sitter.soft(head.surface(strand), shade_of(color, 0.22), 0.22, 0.016)


def _skin_or_rim(sitter: Sitter, region: np.ndarray) -> np.ndarray:
    """Pixels of a region that may reach past the face: beyond its side a point goes on outwards."""
    head = sitter.head
    width, middle, depth = head.at(region[:, 1])
    beyond = np.maximum(np.abs(region[:, 0]) - width, 0)
    pixels = head.surface(region)
    side = np.sign(region[:, 0])
    pixels[:, 0] += side * beyond * head.scale * 1.5
    chin = head.sections[-1, 0]
    pixels[:, 1] += np.maximum(region[:, 1] - chin, 0) * head.scale
    return pixels


def _light(sitter: Sitter, outline: np.ndarray) -> None:
    """Shade the face as a rounded form: ambient light and a lamp, shadows warmer than the skin."""
    canvas, light = sitter.canvas, sitter.light
    low = np.maximum(np.floor(outline.min(0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(outline.max(0)).astype(int) + 2, (canvas.width, canvas.height))
    if (high <= low).any():
        return
    region = (slice(low[1], high[1]), slice(low[0], high[0]))
    middle = (outline.min(0) + outline.max(0)) / 2
    half = (outline.max(0) - outline.min(0)) / 2
    xs = ((np.arange(low[0], high[0]) - middle[0]) / half[0]).astype(np.float32)[None]
    ys = ((np.arange(low[1], high[1]) - middle[1]) / half[1]).astype(np.float32)[:, None]
    depth = np.sqrt(np.maximum(0.06, 1.02 - xs * xs - 0.75 * ys * ys))
    length = np.sqrt(light.x**2 + light.y**2 + 0.8**2)
    lamp = np.clip((xs * light.x + 0.8 * ys * light.y + depth * 0.8) / length, 0, 1)
    brightness = light.ambient + (1.10 - light.ambient) * cv2.pow(lamp, 0.85)
    shadow = np.clip(1 - brightness, 0, 1)[..., None]
    factor = 1 - shadow * np.array([0.90, 1.06, 1.00], np.float32)
    factor = np.where(brightness[..., None] > 1, brightness[..., None], factor)
    mask = sitter.face_mask[region].astype(np.float32)[..., None] / 255
    part = canvas.image[region].astype(np.float32)
    canvas.image[region] = np.clip(part * (1 + (factor - 1) * mask), 0, 255)
