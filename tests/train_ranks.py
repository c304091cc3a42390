"""What the tests of training start with torchrun: `python -m tests.train_ranks COMMAND CONFIG OUT [...]`.

train CONFIG OUT [shard]              a whole run; `shard`: by FSDP2's fully_shard over the processes
gradients CONFIG OUT [shard]          the first batch's gradients, whole, to OUT (safetensors)
keys CONFIG OUT START COUNT WORKERS   which pictures each process got, and where the stream then stands
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from train.checkpoints import whole
from train.config import load_config
from train.data import PlannedBatches, TrainDataset, open_bank_of, open_data
from train.trainer import Trainer


class ShardedTrainer(Trainer):
    """FSDP2 as accelerate applies it on GPUs (its plugin does nothing on a CPU): the adapter as one unit."""

    def _wrap(self, model, optimizers):
        own = list(model.parameters())
        fully_shard(model)
        sharded = dict(zip(map(id, own), model.parameters(), strict=True))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [sharded[id(p)] for p in group["params"]]
        return [model, *(self.accelerator.prepare_optimizer(o, device_placement=False) for o in optimizers)]


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    command, config, out, *more = argv
    if command == "keys":
        return keys(config, Path(out), *map(int, more))
    overrides = [item for item in more if "=" in item]
    trainer = (ShardedTrainer if "shard" in more else Trainer)(load_config(config, overrides))
    assert trainer.is_sharded == ("shard" in more)
    if command == "train":
        trainer.train()
        return None
    batch = next(trainer._batches())
    loss, _ = trainer.train_step(batch, 0)
    trainer.accelerator.backward(loss)
    gradients = {n: whole(p.grad).cpu() for n, p in trainer.adapter.named_parameters() if p.grad is not None}
    if trainer.accelerator.is_main_process:
        save_file(gradients, out)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return None


def keys(path: str, out: Path, start: int, count: int, workers: int) -> None:
    """Pictures of `count` batches from number `start` on; OUT has the stream's states of before, if any."""
    import torch.distributed as dist

    from withanyone import FaceAnalyzer

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = load_config(path, [f"dataloader_num_workers={workers}"])
    analyzer = FaceAnalyzer.from_pretrained(Path(config.pretrained) / "face_analyzer")
    states = json.loads(out.read_text())["states"] if out.exists() else []
    if config.streaming:
        from train.stream import StreamedBatches

        bank = open_bank_of(config, None)
        source = StreamedBatches(config, bank, analyzer, rank=rank, world_size=world_size)
    else:
        dataset = TrainDataset(*open_data(config), config, crop_size=64)
        source = PlannedBatches(dataset, config, rank=rank, world_size=world_size)
    source.load_state(states)
    seen = [batch.latents_keys for batch in islice(source.batches(start), count)]
    gathered: list = [None] * world_size
    dist.all_gather_object(gathered, (seen, source.state()))
    if rank == 0:
        out.write_text(json.dumps({"seen": [s for s, _ in gathered], "states": [s for _, s in gathered]}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
