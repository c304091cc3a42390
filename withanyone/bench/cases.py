"""The bench's cases: who is to be shown, by which photos, where, in what picture; read from four layouts.

    read_cases("MultiID-Bench/")              # parquet of the Hub dataset WithAnyone/MultiID-Bench
    read_cases("OmniContext/")                # parquet of OmniGen2/OmniContext: its single-person subset
    read_cases("released_eval_folder/")       # one folder a case: ori.jpg, ref_1.jpg ..., meta.json
    read_cases("cases/")                      # the same with boxes and names, as `withanyone.mini` writes

Layouts (facts: method.md section 6; OmniContext's columns from its repository's inference script). A broken
case is an error that names it; `check_cases` collects such errors, so that a run can name them all and go on.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..photos import load_image

logger = logging.getLogger(__name__)

#: What the Hub's MultiID-Bench has in every row, and OmniContext.
MULTIID_COLUMNS = ("subset", "prompt", "bboxes", "num_persons", "GT", "input_images")
OMNICONTEXT_COLUMNS = ("key", "task_type", "instruction", "input_images")
#: OmniContext's subset of one person from one photo; the others have objects, scenes or several people.
OMNICONTEXT_SUBSET = "single_character"

LAYOUTS = ("multiid-bench", "omnicontext", "folder")
#: What a result calls the bench, by layout; a folder is called by its own name.
BENCH_NAMES = {"multiid-bench": "MultiID-Bench", "omnicontext": "OmniContext, single person"}
MAX_PEOPLE = 16


@dataclass(frozen=True)
class Picture:
    """One of a case's pictures: the file's bytes, or a path, decoded when asked for."""

    name: str
    source: str | bytes

    @property
    def data(self) -> bytes:
        """The file's bytes. OSError where the file is gone."""
        return self.source if isinstance(self.source, bytes) else Path(self.source).read_bytes()

    @property
    def image(self) -> Image.Image:
        """RGB, upright. ValueError that names the picture where it cannot be read."""
        return load_image(self.source, self.name)

    @property
    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return np.asarray(self.image)


@dataclass(frozen=True)
class Case:
    """One case: a prompt, a reference photo a person, and (except in OmniContext) the picture to be matched.

    Attributes:
        name: unique among the cases; a method's picture of it is `<name>.png`.
        subset: the bench's own (`p1`, `p2`, `p3` in MultiID-Bench).
        references: one photo a person.
        target: the ground truth, None where the bench has none.
        bboxes: (P, 4) xyxy pixels of the target, a box a person in the references' order; None where unknown.
        names: labels of the people, unique among all cases; None where they are not known.
        meta: everything else the case carries, for judges that know its world.
    """

    name: str
    prompt: str
    subset: str
    references: tuple[Picture, ...]
    target: Picture | None = None
    bboxes: np.ndarray | None = None
    names: tuple[str, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_persons(self) -> int:
        return len(self.references)

    def fingerprint(self) -> str:
        """Hash of all that scoring depends on: prompt, boxes, meta, and the bytes of the pictures."""
        boxes = None if self.bboxes is None else self.bboxes.tolist()
        text = json.dumps([self.name, self.prompt, boxes, self.names, self.meta], sort_keys=True)
        digest = hashlib.sha256(text.encode())
        for picture in (*self.references, *([] if self.target is None else [self.target])):
            digest.update(hashlib.sha256(picture.data).digest())
        return digest.hexdigest()


class CaseError(ValueError):
    """A case that cannot be used: `case` is its name, the message says what is wrong with it."""

    def __init__(self, case: str, message: str) -> None:
        super().__init__(f"case {case}: {message}")
        self.case = case


def _make_case(
    name: str,
    *,
    prompt: object,
    subset: object,
    references: Sequence[Picture],
    target: Picture | None,
    bboxes: object = None,
    num_persons: object = None,
    names: object = None,
    meta: dict[str, Any] | None = None,
) -> Case:
    """The case, if its parts agree with each other; a CaseError that says which do not."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise CaseError(name, f"`prompt` is missing: got {prompt!r}, a text is needed")
    if not references:
        raise CaseError(name, "no reference photo: at least one person is needed")
    if len(references) > MAX_PEOPLE:
        raise CaseError(name, f"{len(references)} reference photos: at most {MAX_PEOPLE} people are possible")
    if num_persons is not None and (
        isinstance(num_persons, bool) or not isinstance(num_persons, (int, np.integer))
    ):
        raise CaseError(name, f"`num_persons` is {num_persons!r}: a whole number is needed")
    if num_persons is not None and num_persons != len(references):
        raise CaseError(name, f"`num_persons` is {num_persons}, but there are {len(references)} references")
    boxes = _boxes(name, bboxes)
    if boxes is not None and len(boxes) != len(references):
        raise CaseError(name, f"{len(boxes)} `bboxes` for {len(references)} people: one a person is needed")
    if names is not None:
        if not isinstance(names, (list, tuple)) or len(names) != len(references):
            raise CaseError(name, f"`names` must name {len(references)} people, got {names!r}")
        names = tuple(str(label) for label in names)
    return Case(
        name,
        prompt,
        str(subset or f"p{len(references)}"),
        tuple(references),
        target,
        boxes,
        names,
        meta or {},
    )


def _boxes(name: str, bboxes: object) -> np.ndarray | None:
    """(P, 4) from a list of boxes or its JSON text; None from None or an empty text."""
    if isinstance(bboxes, str):
        if not bboxes.strip():
            return None
        try:
            bboxes = json.loads(bboxes)
        except ValueError as error:
            raise CaseError(name, f"`bboxes` is not JSON ({error})") from error
    if bboxes is None:
        return None
    try:
        boxes = np.array(bboxes, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise CaseError(name, f"`bboxes` must hold four numbers a box, got {bboxes!r}") from error
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise CaseError(name, f"`bboxes` must hold four finite numbers a box, got {bboxes!r}")
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        raise CaseError(name, f"`bboxes` must be (x1, y1, x2, y2) with x2 > x1 and y2 > y1, got {bboxes!r}")
    return boxes


def check_pictures(case: Case) -> None:
    """Decodes every picture of the case; a CaseError names the first that cannot be read."""
    for picture in (*case.references, *([] if case.target is None else [case.target])):
        try:
            picture.image  # noqa: B018 (decoding is the check)
        except (ValueError, OSError) as error:
            raise CaseError(case.name, f"{picture.name} cannot be read: {error}") from error


# ---- layouts ---------------------------------------------------------------------------------------------


class Cases(Sequence[Case]):
    """A bench's cases by number, read when asked for; goes to other processes as its paths alone.

    `source` is where they lie, `layout` one of LAYOUTS, `bench` what results call them, `names` the cases'
    names in order. Reading a broken case raises CaseError.
    """

    source: Path
    layout: str
    bench: str
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Case:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` is {index}: there are {len(self)} cases")
        return self._read(index % len(self))

    def _read(self, index: int) -> Case:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Case]:
        return (self[index] for index in range(len(self)))


class FolderCases(Cases):
    """One folder a case: ori.jpg, ref_1.jpg ... and meta.json with `prompt`; `bboxes`, `names` if known."""

    layout = "folder"

    def __init__(self, source: str | os.PathLike) -> None:
        self.source = Path(source)
        self.bench = self.source.resolve().name
        self._folders = sorted(path.parent for path in self.source.glob("*/meta.json"))
        without = sorted(
            path.parent.name
            for path in self.source.glob("*/ori.*")
            if not path.with_name("meta.json").exists()
        )
        if without:  # no meta.json, yet a case: named as broken rather than passed over
            self._folders = sorted({*self._folders, *(self.source / name for name in without)})
        self.names = [folder.name for folder in self._folders]

    def _read(self, index: int) -> Case:
        folder = self._folders[index]
        name = folder.name
        if not (folder / "meta.json").is_file():
            raise CaseError(name, f"{folder / 'meta.json'} is missing, so there is no `prompt`")
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise CaseError(name, f"meta.json is not JSON ({error})") from error
        if not isinstance(meta, dict):
            raise CaseError(name, f"meta.json holds a {type(meta).__name__}, not settings by name")
        target = _file(folder, "ori")
        if target is None:
            raise CaseError(name, f"no ori.jpg in {folder}: the picture to be matched is missing")
        references = []
        while (photo := _file(folder, f"ref_{len(references) + 1}")) is not None:
            references.append(photo)
        known = ("prompt", "bboxes", "names", "num_persons", "subset")
        return _make_case(
            name,
            prompt=meta.get("prompt"),
            subset=meta.get("subset"),
            references=references,
            target=target,
            bboxes=meta.get("bboxes"),
            num_persons=meta.get("num_persons"),
            names=meta.get("names"),
            meta={key: value for key, value in meta.items() if key not in known},
        )


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def _file(folder: Path, stem: str) -> Picture | None:
    for suffix in SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return Picture(path.name, str(path))
    return None


class ParquetCases(Cases):
    """Rows of local parquet files, in the layout of MultiID-Bench or OmniContext on the Hub."""

    def __init__(self, source: str | os.PathLike, files: Sequence[Path]) -> None:
        self.source = Path(source)
        self._files = [str(file) for file in files]
        columns = set(self._table.column_names)
        if set(MULTIID_COLUMNS) <= columns:
            self.layout = "multiid-bench"
            self._rows = list(range(len(self._table)))
            self.names = [f"{row:04d}" for row in self._rows]
        elif set(OMNICONTEXT_COLUMNS) <= columns:
            self.layout = "omnicontext"
            kinds = [str(kind).lower().replace("-", "_") for kind in self._table["task_type"]]
            self._rows = [row for row, kind in enumerate(kinds) if kind == OMNICONTEXT_SUBSET]
            if not self._rows:
                raise ValueError(
                    f"`source` {self.source}: no row has the task_type {OMNICONTEXT_SUBSET!r}; it has "
                    f"{', '.join(sorted(set(kinds)))}."
                )
            keys = self._table["key"]
            self.names = [str(keys[row]).replace("/", "_") for row in self._rows]  # names of files
        else:
            raise ValueError(
                f"`source` {self.source} has the columns {sorted(columns)}; MultiID-Bench has "
                f"{list(MULTIID_COLUMNS)}, OmniContext {list(OMNICONTEXT_COLUMNS)}."
            )
        self.bench = BENCH_NAMES[self.layout]
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"`source` {self.source}: several rows have one key; names must be unique.")

    @cached_property
    def _table(self):
        try:
            from datasets import Image as ImageFeature
            from datasets import List, load_dataset
        except ImportError as error:
            raise ValueError(
                f"`cases` {self.source} is parquet, which needs the package datasets: "
                'pip install "withanyone[bench]".'
            ) from error
        table = load_dataset("parquet", data_files=self._files, split="train")
        for name, feature in table.features.items():  # the files' bytes; decoding is ours
            if isinstance(feature, ImageFeature):
                table = table.cast_column(name, ImageFeature(decode=False))
            elif isinstance(getattr(feature, "feature", None), ImageFeature):
                table = table.cast_column(name, List(ImageFeature(decode=False)))
        return table

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def _read(self, index: int) -> Case:
        name, row = self.names[index], self._table[self._rows[index]]
        references = _embedded(name, row["input_images"], "input_images")
        if self.layout == "omnicontext":
            if len(references) != 1:
                raise CaseError(name, f"{len(references)} `input_images` in a case of one person")
            return _make_case(
                name, prompt=row["instruction"], subset="p1", references=references, target=None
            )
        target = _embedded(name, [row["GT"]], "GT")
        if not target:
            raise CaseError(name, "`GT` is missing: the picture to be matched")
        return _make_case(
            name,
            prompt=row["prompt"],
            subset=row["subset"],
            references=references,
            target=target[0],
            bboxes=row["bboxes"],
            num_persons=row["num_persons"],
        )


def _embedded(case: str, images: object, column: str) -> list[Picture]:
    """Pictures of one cell; None entries (padding to the largest number of people) are left out."""
    pictures = []
    for number, image in enumerate(images or [], 1):
        if image is None:
            continue
        if isinstance(image, dict) and (image.get("bytes") or image.get("path")):
            pictures.append(Picture(f"{column}_{number}", image.get("bytes") or str(image["path"])))
        elif isinstance(image, bytes) and image:
            pictures.append(Picture(f"{column}_{number}", image))
        else:
            raise CaseError(case, f"`{column}` holds a {type(image).__name__} instead of a picture")
    return pictures


def read_cases(source: str | os.PathLike, layout: str | None = None) -> Cases:
    """The cases of a folder or parquet file; its layout is recognised, or given as one of LAYOUTS.

    Raises:
        ValueError: nothing there, or another layout than the one asked for.
    """
    source = Path(source).expanduser()
    if layout is not None and layout not in LAYOUTS:
        close = difflib.get_close_matches(layout, LAYOUTS, 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"`layout` is {layout!r}. {hint}Available: {', '.join(LAYOUTS)}.")
    if source.is_file() and source.suffix == ".parquet":
        cases: Cases = ParquetCases(source, [source])
    elif source.is_dir() and (files := sorted(source.rglob("*.parquet"))):
        cases = ParquetCases(source, files)
    elif source.is_dir():
        cases = FolderCases(source)
    else:
        raise ValueError(f"`cases` {source} does not exist: give a folder of cases or a parquet file.")
    if not len(cases):
        raise ValueError(
            f"`cases`: neither */meta.json nor *.parquet under {source}; drawn cases are made by "
            "`python -m withanyone.mini cases`, MultiID-Bench is the Hub dataset WithAnyone/MultiID-Bench."
        )
    if layout is not None and cases.layout != layout:
        raise ValueError(f"`layout` is {layout!r}, but {source} has the layout {cases.layout!r}.")
    return cases


def check_cases(cases: Cases, indices: Sequence[int] | None = None) -> dict[int, str]:
    """{index: what is wrong} of the cases that cannot be used; pictures are decoded too."""
    broken = {}
    for index in range(len(cases)) if indices is None else indices:
        try:
            check_pictures(cases[index])
        except CaseError as error:
            broken[index] = str(error)
    return broken


# ---- a method's pictures ---------------------------------------------------------------------------------

SEED_MARK = "--"  # 0012--3.png is the picture of case 0012 at seed 3


def picture_paths(folder: str | os.PathLike, case: str) -> list[Path]:
    """A method's pictures of one case: `<case>.png` (or jpg, jpeg, webp), or `<case>--<seed>.png`, or, in
    the released layout, `<case>/out.jpg`; [] where there is none."""
    folder = Path(folder)
    for suffix in SUFFIXES:
        if (path := folder / f"{case}{suffix}").is_file():
            return [path]
    seeds = [
        path
        for suffix in SUFFIXES
        for path in folder.glob(f"{_literal(case)}{SEED_MARK}*{suffix}")
        if path.stem[len(case) + len(SEED_MARK) :].isdigit()
    ]
    if seeds:
        return sorted(seeds, key=lambda path: int(path.stem[len(case) + len(SEED_MARK) :]))
    released = _file(folder / case, "out")
    return [] if released is None else [Path(str(released.source))]


def _literal(text: str) -> str:
    """`text` in a glob pattern, meaning itself."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)
