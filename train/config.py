"""Settings of a training run: one dataclass, one YAML file a phase, `key=value` on the command line.

Phases differ in data and settings alone, so there is one trainer and this one table. Numbers of the paper
(arXiv 2510.14975) stand here once, as defaults; where paper and released code differ there is a setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

PHASES = Path(__file__).parent / "phases"


@dataclass
class TrainConfig:
    """Everything a run needs. See train/README.md for the table of settings."""

    # --- what is trained -------------------------------------------------------------------------------
    pretrained: str = (
        ""  # a pipeline folder or Hub id: transformer, vae, text encoders, image encoder, face pack
    )
    init_from: str | None = None  # an adapter folder to go on from; None: new weights
    output_dir: str = ""  # checkpoints, log.jsonl, samples and the finished adapter
    seed: int = 0
    adapter_inner_dim: int = 1536  # new weights only: inner width of the cross-attentions
    adapter_num_id_tokens: int = 8  # new weights only: tokens an embedding becomes
    branches: Literal["both", "arc", "sig"] = (
        "both"  # the release trains them apart and merges; "both": together
    )

    # --- data ------------------------------------------------------------------------------------------
    shards: str = ""  # folder with train_rec, train_cp and ref (MultiID-2M's layout)
    cache_dir: str | None = None  # catalogue and reference bank; None: beside the shards
    paired_ratio: float = 0.0  # share of samples from train_cp, each person given by another photo (cp_ratio)
    prompt_source: Literal["caption", "count"] = "caption"  # "count": the fixed prompt of phase 1
    count_prompts: list[str] = field(
        default_factory=lambda: [
            "one person", "two people", "three people", "four people",
            "five people", "six people", "seven people", "eight people",
        ]
    )  # fmt: skip
    text_lengths: list[int] = field(
        default_factory=list
    )  # text is padded to the first of these that holds the batch's
    # captions, where the base knows several lengths; none: to the tokenizer's full length (512 at most)
    text_cache_size: int = 256  # captions whose embeddings are kept in memory
    text_dropout: float = 0.1  # share of samples trained with an empty prompt
    max_faces: int = 8  # records with more people are skipped
    min_aesthetic_score: float | None = None  # phase 4's quality subset: records below it are left out
    buckets: list[list[int]] = field(
        default_factory=lambda: [[512, 512]]
    )  # [width, height] or [w, h, batch size]
    train_batch_size: int = 16  # samples a step over all processes, where a bucket gives no number of its own
    dataloader_num_workers: int = 0
    max_bad_share: float = 0.05  # more unreadable records than this stop the run
    complete_records: bool = True  # landmarks, and embeddings without an .npy: made once by the face pack

    # --- references ------------------------------------------------------------------------------------
    reference_rule: Literal["random", "released"] = (
        "random"  # paper: random; released loader: the most similar
    )
    reference_draws: int = 20  # released rule: photos looked at
    reference_stop_above: float = 0.8  # released rule: the first photo above is taken
    reference_drop_below: float = 0.6  # released rule: where the best is below, the sample is dropped
    reference_thresholds: Literal["cosine", "quantile"] = (
        "cosine"  # "quantile": of the bank's same-person cosines
    )
    reference_crop_jitter: float = 0.0  # face crops moved and resized by up to this share of their side

    # --- the two scales while training -----------------------------------------------------------------
    similarity_range: list[float] = field(default_factory=lambda: [1.0, 1.0])  # total strength, uniform
    diversity_corner_share: float = (
        0.5  # branches "both": share of samples at diversity 0 or 1, the rest between
    )

    # --- losses (method section 4) ---------------------------------------------------------------------
    id_loss_weight: float = 0.1
    id_loss_max_sigma: float = 0.6  # released code: above it the clean estimate is mush
    id_landmarks: Literal["target", "estimate"] = "target"  # paper: GT-aligned, the target's landmarks
    id_faces_per_step: int = 8  # faces decoded and recognised a step and process, at most
    contrastive_loss_weight: float = 0.1
    contrastive_temperature: float = 0.1
    contrastive_positive: Literal["reference", "target"] = (
        "reference"  # paper: reference; released code: target
    )
    num_negatives: int = 4096  # drawn from the reference bank a step (released code: 4,033 a face)
    in_batch_negatives: bool = False  # the batch's other people as negatives too

    # --- noise -----------------------------------------------------------------------------------------
    sigma_sampling: Literal["uniform", "logit_normal"] = "uniform"
    sigma_logit_mean: float = 0.0
    sigma_logit_std: float = 1.0
    timestep_shift: Literal["flux", "released", "none"] = (
        "flux"  # applied to the drawn sigma, by picture size
    )
    guidance: float = 1.0  # guidance input of a guidance-distilled base

    # --- optimisation ----------------------------------------------------------------------------------
    max_train_steps: int = 20_000
    optimizer: Literal["adamw", "adamw8bit", "muon"] = (
        "adamw"  # "muon": block matrices by Muon, the rest AdamW
    )
    learning_rate: float = 1e-4
    muon_learning_rate: float = 2e-3
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = 500
    lr_end_share: float = 0.0  # cosine: what is left of the learning rate at the end
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    ema_decay: float | None = 0.999  # None: no moving average
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    frozen_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the parts that are not trained
    gradient_checkpointing: bool = True
    cpu: bool = False  # stay on the CPU even where there is a GPU

    # --- run -------------------------------------------------------------------------------------------
    checkpointing_steps: int = 500
    checkpointing_minutes: float | None = None  # and whenever so much time has passed
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = "latest"  # a checkpoint folder; None: start anew
    log_steps: int = 20
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb, trackio
    validation_cases: str | None = None  # folder of cases (withanyone.mini cases --split validation)
    validation_steps: int = 0  # 0: never
    validation_count: int = 8
    export_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    def __post_init__(self) -> None:
        for name, allowed in _allowed_values().items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        for name in (
            "paired_ratio",
            "text_dropout",
            "max_bad_share",
            "diversity_corner_share",
            "id_loss_max_sigma",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        for name in (
            "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps",
            "log_steps", "max_faces", "num_negatives", "id_faces_per_step", "reference_draws",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.contrastive_temperature <= 0:
            raise ValueError(
                f"`contrastive_temperature` must be positive, got {self.contrastive_temperature}."
            )
        if not self.buckets or any(len(b) not in (2, 3) or min(b) < 1 for b in self.buckets):
            raise ValueError(
                f"`buckets` must be [width, height] or [width, height, batch size] each, got {self.buckets}."
            )
        if len(self.similarity_range) != 2 or self.similarity_range[0] > self.similarity_range[1]:
            raise ValueError(f"`similarity_range` must be [lowest, highest], got {self.similarity_range}.")
        if len(self.count_prompts) < self.max_faces:
            raise ValueError(
                f"`count_prompts` has {len(self.count_prompts)} entries for `max_faces` {self.max_faces}."
            )

        if "://" in self.shards and not self.cache_dir:
            raise ValueError(
                f"`cache_dir` must be a local folder where `shards` is remote ({self.shards!r})."
            )

    @property
    def uses_identity_losses(self) -> bool:
        return self.id_loss_weight > 0 or self.contrastive_loss_weight > 0

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir else Path(self.shards) / ".train_cache"


def _hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _allowed_values() -> dict[str, tuple[str, ...]]:
    return {n: typing.get_args(h) for n, h in _hints().items() if typing.get_origin(h) is Literal}


def _check_key(key: str, where: str) -> None:
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(
            f"`{key}` ({where}) is not a setting.{hint} All settings: {', '.join(sorted(names))}."
        )


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """YAML's value as the setting's type: `1e-4` is text to YAML, a whole number may stand for a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        # YAML reads a bare `no` as false
        return "no" if value is False and "no" in args else value
    if type(None) in args:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return _coerce(name, value, next(a for a in args if a is not type(None)))
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"`{name}` must be a list, got {value!r}.")
        return [_coerce(name, v, args[0]) for v in value]
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be true or false, got {value!r}.")
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"`{name}` must be a number, got {value!r}.") from None
        if hint is int and number != int(number):
            raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
        return hint(number)
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"`{name}` must be of type {getattr(hint, '__name__', hint)}, got {value!r}.")


def make_config(values: Mapping[str, Any], where: str = "settings") -> TrainConfig:
    """A checked `TrainConfig`. An unknown key is a `ValueError` that names the nearest setting."""
    hints = _hints()
    out = {}
    for key, value in values.items():
        _check_key(key, where)
        out[key] = _coerce(key, value, hints[key])
    return TrainConfig(**out)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings of a phase file as a dict; `extends: other.yaml` (beside it) comes first and is overridden."""
    path = Path(path)
    if not path.exists() and (PHASES / path.name).exists():
        path = PHASES / path.name
    if not path.exists():
        raise ValueError(
            f"`config` {str(path)!r} does not exist. Phases that come along: "
            f"{', '.join(sorted(p.name for p in PHASES.glob('*.yaml')))}."
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"`config` {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`config` {str(path)!r} must hold `key: value` lines, got {type(values).__name__}.")
    base = values.pop("extends", None)
    for key in values:
        _check_key(key, path.name)
    return {**(read_yaml(path.parent / base) if base else {}), **values}


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["learning_rate=2e-4", "buckets=[[128, 128]]"]` as a dict; values are read as YAML."""
    out = {}
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"`{item}` is not an override: write key=value.")
        _check_key(key, "command line")
        out[key] = yaml.safe_load(value)
    return out


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """The phase file with the command line's overrides, checked."""
    return make_config({**read_yaml(path), **parse_overrides(overrides)}, where=str(path))


def dump_config(config: TrainConfig) -> str:
    """The whole resolved config as YAML (what `--dry-run` prints)."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, default_flow_style=None, width=110)
