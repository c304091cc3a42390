"""The trainer: one for all phases, on accelerate.

Only the adapter is trained; it alone is in the module that accelerate wraps, and in checkpoints. What a step
computes is in `step.py`, the frozen parts in `frozen.py`, the data in `data.py` and `stream.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn

from withanyone import FaceAdapter, WithAnyonePipeline
from withanyone.precision import avoid_cudnn_attention

from . import runlog
from .checkpoints import (
    begin_checkpoint,
    find_checkpoint,
    finish_checkpoint,
    flatten_optimizer,
    like,
    load_checkpoint,
    load_weights,
    restore_optimizer,
    whole,
)
from .config import TrainConfig, dump_config
from .data import PlannedBatches, TrainDataset, open_bank_of, open_data
from .examples import Batch
from .frozen import DTYPES, FrozenParts, load_pipeline, precision_of
from .optim import learning_rate_factor, make_optimizers
from .pack import PackReader
from .step import AdapterStep, TrainStep
from .validation import Best, validate

logger = logging.getLogger(__name__)

MIN_READS = 200  # records read before the share of bad ones is judged


def make_adapter(config: TrainConfig, pipeline: WithAnyonePipeline) -> FaceAdapter:
    """The adapter of `init_from`, that of `merge_from`'s two, or a new one that fits the pipeline."""
    if config.init_from:
        return FaceAdapter.from_pretrained(config.init_from).float()
    if config.merge_from:
        return merge_adapters(*config.merge_from).float()
    base = pipeline.transformer.config
    torch.manual_seed(config.seed)
    return FaceAdapter(
        hidden_size=base.num_attention_heads * base.attention_head_dim,
        num_blocks=base.num_layers + base.num_single_layers,
        inner_dim=config.adapter_inner_dim,
        image_feature_dim=pipeline.image_encoder.config.hidden_size,
        num_id_tokens=config.adapter_num_id_tokens,
        pixels_per_token=2 * pipeline.vae_scale_factor,
        branches=("arc", "sig") if config.branches == "both" else (config.branches,),
    )


def merge_adapters(arc: str | Path, sig: str | Path) -> FaceAdapter:
    """One adapter of two that were trained apart (folders in diffusers' layout), on the same base.

    Raises:
        ValueError: a folder's adapter has another branch, or the two differ in a size.
    """
    parts = {"arc": FaceAdapter.from_pretrained(arc), "sig": FaceAdapter.from_pretrained(sig)}
    for name, part in parts.items():
        if part.branches != (name,):
            raise ValueError(f"`merge_from`: the adapter for {name} has the branches {part.branches}.")
    configs = [
        {k: v for k, v in part.config.items() if not k.startswith("_") and k != "branches"}
        for part in parts.values()
    ]
    if configs[0] != configs[1]:
        differ = sorted(k for k in configs[0] if configs[0][k] != configs[1][k])
        raise ValueError(f"`merge_from`: the two adapters differ in {', '.join(differ)}.")
    merged = FaceAdapter(**configs[0], branches=("arc", "sig"))
    merged.load_state_dict({**parts["arc"].state_dict(), **parts["sig"].state_dict()}, strict=True)
    return merged


class Trainer:
    """One run of one phase.

    Args:
        config: its settings.
        pipeline: the frozen parts; by default loaded from `config.pretrained`. Its adapter is not used.
    """

    def __init__(self, config: TrainConfig, pipeline: WithAnyonePipeline | None = None) -> None:
        avoid_cudnn_attention()
        self.config = config
        self.output_dir = Path(config.output_dir)
        missing = [name for name in config.report_to if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"`report_to` names {', '.join(missing)}, not installed here: pip install it.")
        self.accelerator = Accelerator(
            mixed_precision=precision_of(config)[0],
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=config.cpu,
            log_with=config.report_to or None,
            project_dir=str(self.output_dir),
            # a batch whose scales are all on one branch leaves the other's parameters without a gradient
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=config.branches == "both"),
                # one process builds the catalogue or validates, the others wait
                InitProcessGroupKwargs(timeout=timedelta(hours=12)),
            ],
        )
        self.device = self.accelerator.device
        self.pipeline = load_pipeline(config) if pipeline is None else pipeline
        self.frozen = FrozenParts(self.pipeline, config, self.device)
        self._open_source()
        self.adapter = make_adapter(config, self.pipeline)
        self.adapter.train().requires_grad_(True)
        self.adapter.attach(self.pipeline.transformer)
        self.pipeline.register_modules(face_adapter=self.adapter)
        optimizers = make_optimizers(config, self.adapter)
        self.optimizer_names = [names for _, names in optimizers]
        model = AdapterStep(self.adapter, self.pipeline.transformer)
        self.model, *self.optimizers = self._wrap(model, [optimizer for optimizer, _ in optimizers])
        self.train_step = TrainStep(config, self.accelerator, self.frozen, self.model, self.bank)
        self.base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.ema = None
        if config.ema_decay is not None:
            self.ema = {name: p.detach().clone() for name, p in self.adapter.named_parameters()}
        self.step = 0
        self.batch_number = 0  # the place in the data stream: global batches before the one at work
        self.reads = 0
        self.bad: Counter[str] = Counter()
        self.best = Best(self.output_dir / "best", config.best_metric, config.best_min_sim_gt)
        self._resume()

    # --- set-up ------------------------------------------------------------------------------------------

    def _wrap(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list:
        """Model and optimisers as accelerate's configuration says: one process, DDP, FSDP2 or DeepSpeed."""
        accelerator = self.accelerator
        kind = accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and len(optimizers) > 1:
            raise ValueError(f"`optimizer` {self.config.optimizer} does not work with {kind.value}: adamw.")
        if kind == DistributedType.DEEPSPEED:
            share = self.config.train_batch_size // accelerator.num_processes
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = share
        return list(accelerator.prepare(model, *optimizers))

    def _open_source(self) -> None:
        """Bank and batches: by catalogue, or streamed."""
        config, accelerator = self.config, self.accelerator
        analyzer = self.pipeline.face_analyzer
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        if config.streaming:
            from .stream import StreamedBatches

            pack = PackReader(analyzer) if config.complete_records else None
            with accelerator.main_process_first():
                self.bank = open_bank_of(config, pack)
            self.source = StreamedBatches(
                config, self.bank, analyzer, prepare=self.frozen.prepare_crops, **ranks
            )
            return
        with accelerator.main_process_first():  # one process builds what is missing, the others open it
            catalogues, self.bank = open_data(config, analyzer)
        dataset = TrainDataset(catalogues, self.bank, config, crop_size=analyzer.crop_size)
        self.source = PlannedBatches(dataset, config, prepare=self.frozen.prepare_crops, **ranks)

    @property
    def is_sharded(self) -> bool:
        """Whether the adapter's parameters are spread over the processes (FSDP2)."""
        return any(type(p).__name__ == "DTensor" for p in self.adapter.parameters())

    @property
    def faces(self) -> Counter[str]:
        return self.train_step.faces

    # --- the run -----------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Runs from where the output folder is to `max_train_steps`; returns the finished adapter's
        folder."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / "config.yaml").write_text(dump_config(config))
            for name in (runlog.LOG, runlog.VALIDATION):
                runlog.truncate(self.output_dir / name, self.step)
        if config.report_to:
            settings = {k: str(v) for k, v in dataclasses.asdict(config).items()}
            kwargs = runlog.tracker_kwargs(self.output_dir) if accelerator.is_main_process else {}
            accelerator.init_trackers("withanyone", config=settings, init_kwargs=kwargs)
        trainable = sum(p.numel() for p in self.adapter.parameters() if p.requires_grad)
        logger.info(
            "%.2f M parameters to train, step %d of %d", trainable / 1e6, self.step, config.max_train_steps
        )
        batches = self._batches()
        last_save = time.monotonic()
        progress = runlog.Progress(self.step, config.max_train_steps, config.log_steps)
        if self.step and not self._is_validated():  # stopped between the checkpoint and its validation
            self._validate()
        while self.step < config.max_train_steps:
            logs = self._optimizer_step(batches)
            self.step += 1
            self._log(logs)
            progress.update(self.step, logs, self.bad)
            due = (
                config.checkpointing_minutes
                and time.monotonic() - last_save > 60 * config.checkpointing_minutes
            )
            if self._agree(self.step % config.checkpointing_steps == 0 or bool(due)):
                self.save()
                last_save = time.monotonic()
            if config.validation_steps and self.step % config.validation_steps == 0:
                self._validate()
        self.save()
        folder = self.export()
        if config.report_to:
            accelerator.end_training()
        return folder

    def _batches(self) -> Iterator[Batch]:
        """This process's batches from where the run stands, for ever."""
        start = self.step * self.config.gradient_accumulation_steps
        for number, batch in enumerate(self.source.batches(start), start):
            self.batch_number = number
            self._count_reads(batch)
            yield batch

    def _optimizer_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One update of the adapter, over `gradient_accumulation_steps` batches; means of what is logged."""
        config, accelerator = self.config, self.accelerator
        factor = learning_rate_factor(config, self.step)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        sums: Counter[str] = Counter()
        for _ in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(self.model):
                batch = next(batches)
                loss, logs = self.train_step(batch, self.batch_number)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.adapter.parameters(), config.max_grad_norm)
                    if norm is not None:  # DeepSpeed clips by itself
                        logs["grad_norm"] = float(whole(norm)) * config.gradient_accumulation_steps
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            sums.update(logs)
        self._update_ema()
        logs = {name: value / config.gradient_accumulation_steps for name, value in sums.items()}
        if accelerator.num_processes > 1:
            means = accelerator.reduce(torch.tensor(list(logs.values()), device=self.device), "mean")
            logs = dict(zip(logs, means.tolist(), strict=True))
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {self.step}: lower the learning rate."
            )
        return {**logs, "learning_rate": config.learning_rate * factor}

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema is not None:
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            for name, parameter in self.adapter.named_parameters():
                self.ema[name].lerp_(parameter.detach(), 1 - decay)

    def _count_reads(self, batch: Batch) -> None:
        """Stops the run where too many records were passed over (choices of the released rule aside)."""
        self.reads += len(batch.positions) + len(batch.bad)
        self.bad.update(batch.bad)
        damaged = self.bad.total() - self.bad["reference_dropped"]
        if self.reads >= MIN_READS and damaged > self.config.max_bad_share * self.reads:
            raise ValueError(
                f"`shards`: {damaged} of {self.reads} records read were damaged, more than `max_bad_share` "
                f"({self.config.max_bad_share:.1%}): {dict(self.bad)}."
            )

    def _agree(self, mine: bool) -> bool:
        """The main process's answer on every process: clocks differ."""
        if self.accelerator.num_processes == 1:
            return mine
        answer = [mine]
        broadcast_object_list(answer)
        return answer[0]

    def _log(self, logs: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            runlog.append_line(self.output_dir / runlog.LOG, {"step": self.step, **logs})
        if self.config.report_to:
            self.accelerator.log(logs, step=self.step)

    # --- keeping -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step, if there is none. Every process must call it."""
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        root = self.output_dir / "checkpoints"
        partial = root / f"step_{self.step:08d}.partial"
        if accelerator.is_main_process:
            partial = begin_checkpoint(root, self.step)
        states = [self.source.state()]
        counts = [(self.reads, self.bad, self.faces)]
        if accelerator.num_processes > 1:
            states, counts = gather_object(states), gather_object(counts)
        reads, bad, faces = (sum(parts[1:], parts[0]) for parts in zip(*counts, strict=True))
        tensors = {"adapter": self._whole(dict(self.adapter.named_parameters()))}
        if self.ema is not None:
            tensors["ema"] = self._whole(self.ema)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.wait_for_everyone()
            self.model.save_checkpoint(str(partial), tag="deepspeed", exclude_frozen_parameters=True)
        else:
            for k, (optimizer, names) in enumerate(zip(self.optimizers, self.optimizer_names, strict=True)):
                tensors[f"optimizer_{k}"] = flatten_optimizer(optimizer.optimizer, names)
        if accelerator.is_main_process:
            state = {
                "config": dataclasses.asdict(self.config),
                "adapter_config": {k: v for k, v in self.adapter.config.items() if not k.startswith("_")},
                "reads": reads,
                "bad": dict(bad),
                "faces": dict(faces),
                "stream": states,
            }
            finish_checkpoint(partial, self.step, tensors, state, self.config.checkpoints_total_limit)
        accelerator.wait_for_everyone()

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole(tensor.detach()) for name, tensor in tensors.items()}

    def _resume(self) -> None:
        folder = find_checkpoint(self.output_dir / "checkpoints", self.config.resume_from_checkpoint)
        if folder is None:
            return
        tensors, state = load_checkpoint(folder)
        load_weights(self.adapter, tensors["adapter"])
        if self.ema is not None:
            saved = tensors.get("ema", tensors["adapter"])
            self.ema = {name: like(saved[name], own) for name, own in self.ema.items()}
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=True)
        else:
            for k, (optimizer, names) in enumerate(zip(self.optimizers, self.optimizer_names, strict=True)):
                restore_optimizer(optimizer.optimizer, names, tensors[f"optimizer_{k}"])
        self.step = state["step"]
        if self.accelerator.is_main_process:  # counts are sums over the processes
            self.reads, self.bad = state["reads"], Counter(state["bad"])
            self.faces.update(state["faces"])
        self.source.load_state(state.get("stream", []))
        mine = json.loads(json.dumps(dataclasses.asdict(self.config)))
        changed = [k for k, v in mine.items() if state["config"].get(k, v) != v]
        if changed:
            logger.warning("settings changed since the checkpoint: %s", ", ".join(changed))
        logger.info("going on from %s", folder)

    @contextmanager
    def averaged_adapter(self) -> Iterator[FaceAdapter]:
        """An adapter with the moving average (or, without one, the weights) for reading.

        It is the adapter itself, attached as ever, where its parameters are whole on this process, and a
        copy in its place where they are sharded. Every process must enter.
        """
        if self.is_sharded:
            weights = self._whole(self.ema or dict(self.adapter.named_parameters()))
            copy = FaceAdapter.from_config(self.adapter.config).to(self.device)
            load_weights(copy, weights)
            copy.attach(self.pipeline.transformer)
            self.pipeline.register_modules(face_adapter=copy)
            try:
                yield copy
            finally:
                self.adapter.attach(self.pipeline.transformer)
                self.pipeline.register_modules(face_adapter=self.adapter)
            return
        if self.ema is None:
            yield self.adapter
            return
        own = {name: p.detach().clone() for name, p in self.adapter.named_parameters()}
        try:
            load_weights(self.adapter, self.ema)
            yield self.adapter
        finally:
            load_weights(self.adapter, own)

    def export(self) -> Path:
        """Writes the averaged adapter in diffusers' layout (OUT/adapter) and in the released one."""
        folder = self.output_dir / "adapter"
        with self.averaged_adapter() as adapter:
            if self.accelerator.is_main_process:
                export = self._export_copy(adapter)
                export.save_pretrained(folder)
                both = len(export.branches) == 2
                export.save_single_file(
                    self.output_dir / ("withanyone.safetensors" if both else "ipa.safetensors")
                )
                logger.info(
                    "%s: faces seen %s; finished adapter in %s", self.output_dir, dict(self.faces), folder
                )
        self.accelerator.wait_for_everyone()
        return folder

    def _export_copy(self, adapter: FaceAdapter) -> FaceAdapter:
        export = FaceAdapter.from_config(adapter.config)
        load_weights(export, dict(adapter.named_parameters()))
        return export.to(DTYPES[self.config.export_dtype])

    # --- validation --------------------------------------------------------------------------------------

    def _is_validated(self) -> bool:
        """Whether this step's validation, if one is due, has been written down."""
        if not self.config.validation_steps or self.step % self.config.validation_steps:
            return True
        done = False
        if self.accelerator.is_main_process:
            rows = runlog.read_lines(self.output_dir / runlog.VALIDATION)
            done = any(row["step"] == self.step for row in rows)
        return self._agree(done)

    def _validate(self) -> None:
        """Scores and pictures of the fixed cases, by the averaged adapter; the best one is kept."""
        config = self.config
        if not config.validation_cases:
            return
        out = self.output_dir / "samples" / f"step_{self.step:08d}.png"
        with self.averaged_adapter() as adapter:
            if self.accelerator.is_main_process:
                adapter.eval()
                with self.accelerator.autocast():
                    scores = validate(self.pipeline, config.validation_cases, config.validation_count, out)
                adapter.train()
                if self.best.is_better(scores):
                    self.best.keep(self._export_copy(adapter), self.step, scores)
                    logger.info("step %d is the best so far by %s", self.step, config.best_metric)
                self._report_validation(scores, out)
        self.accelerator.wait_for_everyone()

    def _report_validation(self, scores: dict[str, float], sheet: Path) -> None:
        shown = {k: round(v, 4) for k, v in scores.items()}
        logger.info("validation at step %d: %s", self.step, shown)
        for tracker in self.accelerator.trackers:
            tracker.log({f"validation/{k}": v for k, v in scores.items()}, step=self.step)
            picture = np.asarray(Image.open(sheet).convert("RGB"))[None]  # (1, H, W, 3)
            if tracker.name == "trackio":  # accelerate has no pictures for it
                import trackio

                tracker.log({"validation/pictures": trackio.Image(picture[0])}, step=self.step)
            else:
                more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation/pictures": picture}, step=self.step, **more)
        # last: the line says that this step's validation is done
        runlog.append_line(self.output_dir / runlog.VALIDATION, {"step": self.step, **scores})
