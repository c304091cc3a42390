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
COUNT_PROMPTS = (
    "one person", "two people", "three people", "four people",
    "five people", "six people", "seven people", "eight people",
)  # fmt: skip


def setting(default: Any, about: str, section: str = "") -> Any:
    """A field of `TrainConfig` with what it means; `section` opens a new part of the table."""
    metadata = {"about": about, "section": section}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: [*default], metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything a run needs. `python -m train settings` prints the table of train/README.md."""

    pretrained: str = setting(
        "",
        "a pipeline folder or Hub id: transformer, VAE, text encoders, image encoder, face pack",
        "What is trained",
    )
    init_from: str | None = setting(None, "an adapter folder to go on from; none: new weights")
    merge_from: list[str] = setting(
        (), "folders of an arc and a sig adapter that were trained apart: begin with both, merged"
    )
    output_dir: str = setting("", "checkpoints, log.jsonl, samples and the finished adapter")
    seed: int = setting(0, "of everything random")
    adapter_inner_dim: int = setting(1536, "new weights only: inner width of the cross-attentions")
    adapter_num_id_tokens: int = setting(8, "new weights only: tokens an embedding becomes")
    branches: Literal["both", "arc", "sig"] = setting(
        "both", "both together, or one apart (as released), to be merged afterwards"
    )

    shards: str = setting("", "folder with train_rec, train_cp and ref (MultiID-2M's layout)", "Data")
    extra_shards: list[str] = setting(
        (), "further folders with train_rec or train_cp, such as stylised variants; their people are in `ref`"
    )
    cache_dir: str | None = setting(None, "catalogue, reference bank and caches; none: beside the shards")
    paired_ratio: float = setting(
        0.0, "share of samples from train_cp, each person given by another photo (released: cp_ratio)"
    )
    prompt_source: Literal["caption", "count"] = setting(
        "caption", "`count`: the fixed prompt of phase 1, by number of people"
    )
    count_prompts: list[str] = setting(COUNT_PROMPTS, "the fixed prompts")
    text_lengths: list[int] = setting(
        (),
        "text is padded to the first of these that holds the batch; none: to the full length (512 at most)",
    )
    text_cache_size: int = setting(256, "captions whose embeddings are kept in memory")
    text_dropout: float = setting(0.1, "share of samples trained with an empty prompt")
    max_faces: int = setting(8, "records with more people are skipped")
    min_aesthetic_score: float | None = setting(
        None, "phase 4's quality subset: records below it are left out"
    )
    buckets: list[list[int]] = setting(
        ([512, 512],), "picture sizes: [width, height] or [width, height, samples a step]"
    )
    train_batch_size: int = setting(
        16, "samples a step over all processes, where a bucket gives no number of its own"
    )
    dataloader_num_workers: int = setting(0, "data workers a process")
    max_bad_share: float = setting(0.05, "more unreadable records than this stop the run")
    complete_records: bool = setting(
        True, "landmarks, and embeddings without an .npy: made once by the face pack"
    )

    streaming: bool = setting(
        False, "read the shards one after another instead of at random places: for remote data", "Streaming"
    )
    stream_lanes: int = setting(
        16, "parts the shards are dealt to; processes times workers must divide it, and a subset have as many"
    )
    stream_shuffle: int = setting(128, "records of a lane that are shuffled together (kept in memory)")

    cache_latents: bool = setting(
        False, "keep every picture's latents on disk (512 px: 262 kB each)", "Caches on disk"
    )
    cache_text: bool = setting(
        False, "keep every caption's embeddings on disk (FLUX.1: 4 MB each at full length)"
    )

    reference_rule: Literal["random", "released"] = setting(
        "random", "paper: random; released loader: the most similar of those drawn", "References"
    )
    reference_draws: int = setting(20, "released rule: photos looked at")
    reference_stop_above: float = setting(0.8, "released rule: the first photo above is taken")
    reference_drop_below: float = setting(
        0.6, "released rule: where the best is below, the sample is dropped"
    )
    reference_thresholds: Literal["cosine", "quantile"] = setting(
        "cosine", "`quantile`: the two thresholds are quantiles of the bank's same-person cosines"
    )
    reference_crop_jitter: float = setting(
        0.0, "face crops moved and resized by up to this share of their side"
    )

    similarity_range: list[float] = setting(
        (1.0, 1.0), "total strength while training, uniform", "The two sliders while training"
    )
    diversity_corner_share: float = setting(
        0.5, "branches `both`: share of samples at diversity 0 or 1, the rest between"
    )
    diversity_by_subset: bool = setting(
        False, "reconstructed samples lean to diversity 0, paired ones to 1: copying follows the slider"
    )

    id_loss_weight: float = setting(0.1, "lambda_ID", "Losses (method section 4)")
    id_loss_max_sigma: float = setting(
        0.6, "released code: above this noise level the clean estimate is mush, no identity losses"
    )
    id_landmarks: Literal["target", "estimate"] = setting(
        "target", "paper: the target's landmarks; `estimate`: found on the decoded estimate"
    )
    id_faces_per_step: int = setting(8, "faces decoded and recognised a step and process, at most")
    contrastive_loss_weight: float = setting(0.1, "lambda_CL")
    contrastive_temperature: float = setting(0.1, "tau")
    contrastive_positive: Literal["reference", "target"] = setting(
        "reference", "paper: reference; released code: target"
    )
    num_negatives: int = setting(
        4096, "drawn from the reference bank a step (released code: 4,033 a face); 0: in-batch ones only"
    )
    in_batch_negatives: bool = setting(False, "other people of this process's batch as negatives too")

    sigma_sampling: Literal["uniform", "logit_normal"] = setting(
        "uniform", "distribution of the noise level", "Noise"
    )
    sigma_logit_mean: float = setting(0.0, "of the logit-normal")
    sigma_logit_std: float = setting(1.0, "of the logit-normal")
    timestep_shift: Literal["flux", "released", "none"] = setting(
        "flux", "applied to the drawn noise level, by picture size"
    )
    guidance: float = setting(1.0, "guidance input of a guidance-distilled base")

    max_train_steps: int = setting(20_000, "the run's length", "Optimisation")
    optimizer: Literal["adamw", "adamw_fused", "adamw8bit", "muon"] = setting(
        "adamw", "`adamw8bit` needs bitsandbytes; `muon`: block matrices by Muon, the rest by AdamW"
    )
    learning_rate: float = setting(1e-4, "of AdamW")
    muon_learning_rate: float = setting(2e-3, "of Muon")
    weight_decay: float = setting(0.01, "of all optimisers")
    adam_beta1: float = setting(0.9, "")
    adam_beta2: float = setting(0.999, "")
    lr_scheduler: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = setting(
        "constant", "after the warm-up; `wsd`: constant, then linear over the last `lr_decay_steps`"
    )
    lr_warmup_steps: int = setting(500, "linear from 0")
    lr_decay_steps: int = setting(1000, "`wsd`: length of the decay at the end")
    lr_end_share: float = setting(0.0, "linear, cosine, wsd: what is left of the learning rate at the end")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    gradient_accumulation_steps: int = setting(1, "batches a step")
    ema_decay: float | None = setting(0.999, "of the moving average that is exported; none: no average")
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = setting(
        "bf16", "autocast; `auto`: bf16 where the machine computes in it, else no"
    )
    frozen_dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "bfloat16", "of the parts that are not trained; `auto` likewise"
    )
    gradient_checkpointing: bool = setting(True, "of the transformer's blocks")
    cpu: bool = setting(False, "stay on the CPU even where there is a GPU")

    checkpointing_steps: int = setting(500, "steps between checkpoints", "Run")
    checkpointing_minutes: float | None = setting(None, "and whenever so much time has passed")
    checkpoints_total_limit: int = setting(2, "older ones are deleted")
    resume_from_checkpoint: str | None = setting("latest", "or a checkpoint folder; none: start anew")
    log_steps: int = setting(20, "steps between lines on the screen (log.jsonl has every step)")
    report_to: list[str] = setting((), "trackers: tensorboard, wandb, trackio")
    validation_cases: str | None = setting(
        None, "folder of cases in the bench's layout (withanyone.mini cases --split validation)"
    )
    validation_steps: int = setting(0, "steps between validations; 0: never")
    validation_count: int = setting(8, "cases, the first by name")
    best_metric: str | None = setting(
        None,
        "keep the best adapter by it: found, sim_gt, sim_ref, copy_paste or blending (the last two: low)",
    )
    best_min_sim_gt: float = setting(
        0.0, "an adapter below this sim_gt is not the best: a model blind to faces copies nothing"
    )
    export_dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", "of the finished adapter")

    def __post_init__(self) -> None:
        for name, allowed in _allowed_values().items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        for name in (
            "paired_ratio", "text_dropout", "max_bad_share", "diversity_corner_share", "id_loss_max_sigma",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        for name in (
            "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps",
            "log_steps", "max_faces", "id_faces_per_step", "reference_draws", "stream_lanes",
            "stream_shuffle", "lr_decay_steps", "validation_count", "checkpoints_total_limit",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        self._check_losses()
        self._check_data()
        if self.merge_from and (
            len(self.merge_from) != 2 or self.init_from is not None or self.branches != "both"
        ):
            raise ValueError(
                "`merge_from` must be [arc folder, sig folder], with `branches: both` and no `init_from`; "
                f"got {self.merge_from}, `branches` {self.branches!r}, `init_from` {self.init_from!r}."
            )
        if self.best_metric is not None and self.best_metric not in BEST_OF:
            raise ValueError(f"`best_metric` must be one of {', '.join(BEST_OF)}, got {self.best_metric!r}.")
        if self.best_metric is not None and not (self.validation_steps and self.validation_cases):
            raise ValueError("`best_metric` needs `validation_steps` and `validation_cases`.")
        unknown = [name for name in self.report_to if name not in TRACKERS]
        if unknown:
            raise ValueError(f"`report_to` must be of {', '.join(TRACKERS)}, got {unknown}.")

    def _check_losses(self) -> None:
        if self.num_negatives < (0 if self.in_batch_negatives else 1):
            raise ValueError(
                f"`num_negatives` must be at least 1 (0 with `in_batch_negatives`), got {self.num_negatives}."
            )
        if self.contrastive_temperature <= 0:
            raise ValueError(
                f"`contrastive_temperature` must be positive, got {self.contrastive_temperature}."
            )

    def _check_data(self) -> None:
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

    @property
    def roots(self) -> list[str]:
        """All folders of shards, the one with `ref` first."""
        return [self.shards, *self.extra_shards]


# What a best adapter may be chosen by, and whether more of it is better (+1) or less (-1).
BEST_OF = {"found": 1, "sim_gt": 1, "sim_ref": 1, "copy_paste": -1, "blending": -1}
TRACKERS = ("tensorboard", "wandb", "trackio")


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


def settings_table() -> str:
    """The table of settings in train/README.md: every setting with its default and meaning."""
    lines = []
    for item in dataclasses.fields(TrainConfig):
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        shown = yaml.safe_dump(default, default_flow_style=True, width=1000).replace("\n...", "").strip()
        if item.name == "count_prompts":
            shown = "[one person, two people, ...]"
        if item.metadata["section"]:
            lines += ["", f"**{item.metadata['section']}**", "", "| setting | default | |", "|---|---|---|"]
        allowed = typing.get_args(_hints()[item.name])
        literal = typing.get_origin(_hints()[item.name]) is Literal
        choice = f"one of {', '.join(allowed)}" if literal else ""
        about = "; ".join(part for part in (item.metadata["about"], choice) if part)
        lines.append(f"| `{item.name}` | `{shown}` | {about} |")
    return "\n".join(lines).strip() + "\n"
