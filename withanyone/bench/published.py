"""Tables 1 and 2 of the WithAnyone paper (arXiv 2510.14975) as data, with their notes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """One row: a method and its figures by metric, as printed."""

    method: str
    values: dict[str, float]
    notes: tuple[str, ...] = field(default=())

    @property
    def ranked(self) -> bool:
        """GT and Ref are yardsticks, not methods."""
        return self.method not in YARDSTICKS


YARDSTICKS = ("GT", "Ref")
PRIOR_KNOWLEDGE = "prior"  # the note's mark
NOTES = {PRIOR_KNOWLEDGE: "GPT has prior knowledge of the people in cases of more than two."}
RANKING_NOTE = (
    "CP is ranked only among methods with Sim(GT) > {threshold:.2f}: whoever draws strangers copies nothing."
)

COLUMNS_1 = ("sim_gt", "sim_ref", "copy_paste", "clip_i", "clip_t", "aesthetic")
COLUMNS_2 = ("sim_gt", "sim_ref", "copy_paste", "blending", "clip_i", "clip_t")


def _rows(text: str, columns: tuple[str, ...], notes: dict[str, tuple[str, ...]]) -> tuple[Published, ...]:
    rows = []
    for line in text.strip().splitlines():
        method, _, numbers = line.partition("|")
        values = [float(number) for number in numbers.split()]
        named = dict(zip(columns, values, strict=False))
        rows.append(Published(method.strip(), named, notes.get(method.strip(), ())))
    return tuple(rows)


#: Table 1, one person.
TABLE_1 = _rows(
    """
    DreamO          | 0.454 0.694 0.303 0.793 0.322 4.877
    OmniGen         | 0.398 0.602 0.248 0.780 0.317 5.069
    OmniGen2        | 0.365 0.475 0.142 0.787 0.331 4.991
    FLUX.1 Kontext  | 0.324 0.408 0.099 0.755 0.327 5.319
    Qwen-Image-Edit | 0.324 0.409 0.093 0.776 0.316 5.056
    GPT-4o Native   | 0.425 0.579 0.178 0.794 0.311 5.344
    UNO             | 0.304 0.428 0.141 0.765 0.314 4.923
    USO             | 0.401 0.635 0.286 0.790 0.329 5.077
    UMO             | 0.458 0.732 0.359 0.783 0.305 4.850
    UniPortrait     | 0.447 0.677 0.265 0.793 0.319 5.018
    ID-Patch        | 0.426 0.633 0.231 0.792 0.312 4.900
    InfU            | 0.439 0.630 0.233 0.772 0.328 5.359
    PuLID           | 0.452 0.705 0.315 0.779 0.305 4.839
    InstantID       | 0.464 0.734 0.337 0.764 0.295 5.255
    WithAnyone      | 0.460 0.578 0.144 0.798 0.313 4.783
    GT              | 1.000 0.521 -0.999
    Ref             | 0.521 1.000 0.999
    """,
    COLUMNS_1,
    {},
)
#: Table 2, several people.
TABLE_2 = _rows(
    """
    DreamO      | 0.359 0.514 0.179 0.105 0.763 0.319
    OmniGen     | 0.345 0.529 0.209 0.110 0.750 0.326
    OmniGen2    | 0.283 0.353 0.081 0.112 0.763 0.334
    GPT         | 0.332 0.400 0.061 0.092 0.774 0.328
    UNO         | 0.223 0.274 0.043 0.082 0.735 0.325
    UMO         | 0.328 0.491 0.176 0.111 0.743 0.316
    UniPortrait | 0.367 0.601 0.254 0.075 0.750 0.323
    ID-Patch    | 0.350 0.517 0.183 0.085 0.767 0.326
    PuLID       | 0.405 0.551 0.161 0.079 0.770 0.321
    WithAnyone  | 0.414 0.561 0.171 0.045 0.771 0.325
    """,
    COLUMNS_2,
    {"GPT": (PRIOR_KNOWLEDGE,)},
)
