"""The bench's metrics by name, and their figures: means over people and pictures, intervals over cases.

How each mean counts what is missing:

    a picture that is missing or unreadable     all its people are not found, nothing it was asked is shown;
                                                no whole-picture values
    a person who is not found                   0 in sim_gt, sim_ref and rank_one; left out of copy_paste,
                                                sim_gt_found and pose_copied, whose n says so
    a target or photo without a face            that person has no truth: left out of what needs it, counted
    a face too many                             counted in extra_faces; the assignment leaves it over
    fewer than two assigned people              no blending
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from . import metrics
from .scoring import Settings, Vectors

SUBSETS: dict[str, Callable[[dict], bool]] = {
    "all": lambda row: True,
    "single": lambda row: row["num_persons"] == 1,
    "multi": lambda row: row["num_persons"] > 1,
}


@dataclass(frozen=True)
class Metric:
    """A figure's short label, whether more is better (+1), less (-1) or neither (0), and what it is."""

    label: str
    better: int
    what: str


METRICS: dict[str, Metric] = {
    "sim_gt": Metric("Sim(GT)", +1, "cosine to the target's face; 0 for people who are not found"),
    "sim_ref": Metric("Sim(Ref)", 0, "cosine to the photo's face; 0 for people who are not found"),
    "copy_paste": Metric("CP", -1, "-1: the target's face, +1: the photo's; found people only"),
    "blending": Metric("Bld", -1, "cosine with the people of the picture one should not be"),
    "clip_i": Metric("CLIP-I", +1, "CLIP's cosine of picture and target"),
    "clip_t": Metric("CLIP-T", +1, "CLIP's cosine of picture and prompt"),
    "aesthetic": Metric("Aes", +1, "aesthetic score, 1 to 10"),
    "prompt_following": Metric("Prompt", +1, "share of what the prompt says that the picture shows"),
    "ceiling": Metric("GT-Ref", 0, "cosine of the target's and the photo's face: two real pictures"),
    "sim_gt_found": Metric("Sim(GT), found", +1, "cosine to the target's face, found people only"),
    "sim_gt_in_box": Metric("Sim(GT), box", +1, "of the face in the person's own box; 0 where none stands"),
    "found": Metric("Found", +1, "share of people to whom a face is assigned"),
    "in_box": Metric("In box", +1, "share of people in whose box a face stands"),
    "swapped": Metric("Swapped", -1, "share of people of groups whose box holds a face nearer to another's"),
    "extra_faces": Metric("Extra", -1, "faces a picture beyond the people asked for"),
    "rank_one": Metric("Rank 1", +1, "share of people nearer to their target than to 199 others'"),
    "strangers": Metric("Strangers", 0, "mean cosine of a generated face with other people's targets"),
    "pose_copied": Metric("Pose CP", -1, "copy-paste of the yaw, where target and photo look elsewhere"),
}
IDENTITY = ("sim_gt", "sim_ref", "copy_paste", "blending", "ceiling", "sim_gt_found", "sim_gt_in_box")

Key = tuple[str, int, int]  # case, number of the picture, number of the person (-1: the whole picture)
Values = dict[Key, float]


# ---- values of one metric --------------------------------------------------------------------------------


def people_of(rows: Iterable[dict]) -> Iterable[tuple[Key, dict, dict]]:
    for row in rows:
        for number, picture in enumerate(row["pictures"]):
            for person, entry in enumerate(picture["people"]):
                yield (row["case"], number, person), picture, entry


def pictures_of(rows: Iterable[dict]) -> Iterable[tuple[Key, dict]]:
    for row in rows:
        for number, picture in enumerate(row["pictures"]):
            yield (row["case"], number, -1), picture


def _mean_score(entry: dict, name: str, judges: Sequence[str]) -> float | None:
    values = [entry["scores"][judge][name] for judge in judges if name in entry["scores"][judge]]
    return float(np.mean(values)) if values else None


def metric_values(rows: Sequence[dict], metric: str, judges: Sequence[str], settings: Settings) -> Values:
    """Every single value of a metric, by case, picture and person; missing people as the module says.

    judges: the recognisers whose mean an identity metric is.
    """
    out: Values = {}
    if metric in ("clip_i", "clip_t", "aesthetic"):
        return {key: p["values"][metric] for key, p in pictures_of(rows) if metric in p["values"]}
    if metric == "blending":
        return {
            key: float(np.mean([p["blending"][judge] for judge in judges]))
            for key, p in pictures_of(rows)
            if p["blending"]
        }
    if metric == "extra_faces":
        return {key: float(p["extra_faces"]) for key, p in pictures_of(rows)}
    for key, _, entry in people_of(rows):
        value: float | None = None
        if metric == "found":
            value = float(entry["found"])
        elif metric in ("in_box", "swapped", "rank_one", "strangers"):
            value = None if entry.get(metric) is None else float(entry[metric])
        elif metric == "pose_copied":
            value = _pose_copied(entry, settings.min_yaw_change)
        elif metric == "prompt_following":
            value = _followed(entry)
        elif metric == "sim_ref":
            if entry["pose_reference"] is not None:
                value = _mean_score(entry, "sim_ref", judges) if entry["found"] else 0.0
        elif entry["truth"]:
            if metric == "sim_gt":
                value = _mean_score(entry, "sim_gt", judges) if entry["found"] else 0.0
            elif metric == "sim_gt_in_box":
                if entry["in_box"] is not None:
                    value = _mean_score(entry, "sim_gt_in_box", judges) if entry["in_box"] else 0.0
            elif metric == "ceiling":
                value = _mean_score(entry, "ceiling", judges)
            elif entry["found"]:
                value = _mean_score(entry, {"sim_gt_found": "sim_gt"}.get(metric, metric), judges)
        if value is not None:
            out[key] = value
    return out


def values_of(result: dict, metric: str) -> Values:
    """`metric_values` of a whole results.json, by its own judges and settings."""
    return metric_values(result["rows"], metric, result["identity_by"], Settings.of(result))


def _pose_copied(entry: dict, min_change: float) -> float | None:
    poses = [entry[name] for name in ("pose", "pose_target", "pose_reference")]
    if any(pose is None for pose in poses):
        return None
    made, target, reference = (pose[0] for pose in poses)
    if abs(target - reference) < min_change:
        return None
    return float(metrics.copied_share(*(np.array([value]) for value in (made, target, reference)))[0])


def _followed(entry: dict) -> float | None:
    asked = entry.get("asked")
    if not asked:
        return None
    read = entry["read"] or {}
    return float(np.mean([read.get(name) == value for name, value in asked.items()]))


def _figure(values: Values, bootstrap: dict) -> dict | None:
    if not values:
        return None
    return metrics.mean_with_interval(list(values.values()), [key[0] for key in values], **bootstrap)


# ---- figures ---------------------------------------------------------------------------------------------


def figures(rows: Sequence[dict], judges: Sequence[str], settings: Settings, bootstrap: dict) -> dict:
    """{subset: {metric: figure}}; a metric that nothing was measured for is left out."""
    out: dict[str, dict] = {}
    for subset, belongs in SUBSETS.items():
        chosen = [row for row in rows if belongs(row)]
        found = {
            metric: _figure(metric_values(chosen, metric, judges, settings), bootstrap) for metric in METRICS
        }
        out[subset] = {metric: figure for metric, figure in found.items() if figure is not None}
    return out


def add_crowd(rows: Sequence[dict], vectors: Sequence[Vectors]) -> None:
    """Writes `rank_one` and `strangers` into every person's entry: the face among everybody's targets.

    Left out where a person has no truth, or where the bench shows one person only; a person who is not found
    has rank_one 0 and no `strangers`.
    """
    targets, names, places = [], [], {}
    for row, part in zip(rows, vectors, strict=True):
        for person, vector in enumerate(part["target"]):
            if vector.size and np.isfinite(vector).all():
                places[row["case"], person] = len(targets)
                targets.append(vector)
                names.append(row["names"][person] if row["names"] else f"{row['case']} {person}")
    if len(set(names)) < 2:
        return
    faces, own, entries = [], [], []
    for row, part in zip(rows, vectors, strict=True):
        for number, picture in enumerate(row["pictures"]):
            for person, entry in enumerate(picture["people"]):
                if (row["case"], person) not in places:
                    continue
                entry["rank_one"] = 0.0
                if entry["found"]:
                    faces.append(part["generated"][number, person])
                    own.append(places[row["case"], person])
                    entries.append(entry)
    if not faces:
        return
    generated, gallery, labels = np.stack(faces), np.stack(targets), np.array(names)
    matrix = metrics.similarity_matrix(generated, gallery)  # (G, U)
    other = labels[own][:, None] != labels[None]
    strangers = (matrix * other).sum(axis=1) / other.sum(axis=1)
    for entry, hit, mean in zip(
        entries, metrics.rank_one(generated, gallery, own, names), strangers, strict=True
    ):
        entry["rank_one"], entry["strangers"] = float(hit), round(float(mean), 6)


def copied_attributes(entry: dict) -> list[str]:
    """What one generated face took from its photo: attributes in which photo and target disagree and the
    picture shows the photo's."""
    if not entry.get("read") or "target" not in entry:
        return []
    return [
        name
        for name, photo in entry["reference"].items()
        if name in entry["target"] and photo != entry["target"][name] and entry["read"].get(name) == photo
    ]


def attribute_figures(
    rows: Sequence[dict], judges: Sequence[str], settings: Settings, bootstrap: dict
) -> dict | None:
    """For each attribute, where a judge knows the world:

    followed        share of those the prompt asks for that the picture shows
    copied          where photo and target disagree: share that shows the photo's value
    as_target       ... the target's value
    by_chance       ... the photo's value in pictures of people with other photos: what copying nothing
                    gives, from the shares with which values are read at all
    copy_paste_of_copied, copy_paste_of_others     mean copy-paste of the faces that took it, and did not
    """
    people = [
        (key, entry) for key, _, entry in people_of(rows) if entry.get("read") and entry.get("reference")
    ]
    if not people:
        return None
    copy_paste = metric_values(rows, "copy_paste", judges, settings)
    out: dict[str, dict] = {}
    for name in sorted({name for _, entry in people for name in entry["target"]}):
        asked = {key: float(e["read"][name] == e["asked"][name]) for key, e in people if name in e["asked"]}
        differ = {
            key: entry for key, entry in people if name in entry["reference"]
            and entry["reference"][name] != entry["target"][name] and name in entry["read"]
        }  # fmt: skip
        taken = {key: float(e["read"][name] == e["reference"][name]) for key, e in differ.items()}
        meant = {key: float(e["read"][name] == e["target"][name]) for key, e in differ.items()}
        found = {
            "followed": _figure(asked, bootstrap),
            "copied": _figure(taken, bootstrap),
            "as_target": _figure(meant, bootstrap),
            "by_chance": _chance(list(differ.values()), name),
        }
        for label, flag in (("copy_paste_of_copied", 1.0), ("copy_paste_of_others", 0.0)):
            found[label] = _figure(
                {key: copy_paste[key] for key, value in taken.items() if value == flag and key in copy_paste},
                bootstrap,
            )
        out[name] = {label: value for label, value in found.items() if value is not None}
    return out


def _chance(entries: Sequence[dict], name: str) -> float | None:
    """Chance that one picture shows what another one's photo shows, both with the same target value apart:
    sum over values of (share read) x (share of photos)."""
    if len(entries) < 2:
        return None
    read, photo = ([entry[part][name] for entry in entries] for part in ("read", "reference"))
    matches = sum(read.count(value) * photo.count(value) for value in set(photo))
    own = sum(a == b for a, b in zip(read, photo, strict=True))
    return round((matches - own) / (len(entries) * (len(entries) - 1)), 6)


def diversity_figures(rows: Sequence[dict], vectors: Sequence[Vectors], bootstrap: dict) -> dict | None:
    """How much pose and attributes vary over a case's pictures (seeds) while the person stays the same.

    yaw, roll: mean absolute difference between two pictures (yaw in distances between the eyes, roll in
    radians); one figure an attribute: share of pairs that differ; identity: mean cosine between two pictures'
    faces. `real`: the same between target and photo, two pictures of the world itself.
    """
    made: dict[str, Values] = {}
    real: dict[str, Values] = {}
    for row, part in zip(rows, vectors, strict=True):
        if len(row["pictures"]) < 2:
            continue
        for person in range(row["num_persons"]):
            entries = [picture["people"][person] for picture in row["pictures"]]
            key = (row["case"], 0, person)
            for axis, name in enumerate(("yaw", "roll")):
                values = [entry["pose"][axis] for entry in entries if entry["pose"] is not None]
                if len(values) > 1:
                    made.setdefault(name, {})[key] = _spread(values)
                pair = [entries[0]["pose_target"], entries[0]["pose_reference"]]
                if None not in pair:
                    real.setdefault(name, {})[key] = abs(pair[0][axis] - pair[1][axis])
            faces = part["generated"][:, person]
            faces = faces[np.isfinite(faces).all(axis=1)] if faces.size else faces[:0]
            if len(faces) > 1:
                matrix = metrics.similarity_matrix(faces, faces)
                off = matrix[~np.eye(len(faces), dtype=bool)]
                made.setdefault("identity", {})[key] = float(off.mean())
            ceiling = _mean_score(entries[0], "ceiling", list(entries[0]["scores"]))
            if ceiling is not None:
                real.setdefault("identity", {})[key] = ceiling
            read = [entry["read"] for entry in entries if entry.get("read")]
            if len(read) > 1:
                for name in read[0]:
                    made.setdefault(name, {})[key] = metrics.disagreement([r[name] for r in read])
                    if name in entries[0].get("reference", {}):
                        differ = entries[0]["target"].get(name) != entries[0]["reference"][name]
                        real.setdefault(name, {})[key] = float(differ)
    if not made:
        return None
    return {
        "between_seeds": {name: _figure(values, bootstrap) for name, values in made.items()},
        "real": {name: _figure(values, bootstrap) for name, values in real.items()},
    }


def _spread(values: Sequence[float]) -> float:
    """Mean absolute difference of all pairs."""
    array = np.asarray(values)
    count = len(array)
    return float(np.abs(array[:, None] - array[None]).sum() / (count * (count - 1)))


def check_metric(name: str) -> str:
    """`name`, if it is a metric's; else a ValueError with the nearest and all there are."""
    if name in METRICS:
        return name
    close = difflib.get_close_matches(name, METRICS, 1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"`metrics` has {name!r}. {hint}Available: {', '.join(METRICS)}.")
