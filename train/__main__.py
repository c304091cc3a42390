"""Command line of training: `python -m train --config PHASE.yaml [PHASE.yaml ...] [key=value ...]`.

`prepare --config ...` reads the shards ahead, `check` and `references` look at shards alone.

Several phases run in turn, each going on from the last one's adapter. The same command again goes on where
the run was; a finished phase is passed over.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections import Counter
from pathlib import Path

from .config import TrainConfig, dump_config, load_config

logger = logging.getLogger("train")


def is_finished(config: TrainConfig) -> bool:
    """Whether the phase's last checkpoint is at its last step, and the adapter written."""
    from .checkpoints import find_checkpoint, load_checkpoint

    folder = find_checkpoint(Path(config.output_dir) / "checkpoints", config.resume_from_checkpoint)
    if folder is None or not (Path(config.output_dir) / "adapter" / "config.json").exists():
        return False
    return load_checkpoint(folder)[1]["step"] >= config.max_train_steps


def chain(paths: list[str], overrides: list[str]) -> list[TrainConfig]:
    """The phases' configs; a phase that names no `init_from` goes on from the one before it."""
    configs: list[TrainConfig] = []
    for path in paths:
        config = load_config(path, overrides)
        if configs and config.init_from is None:
            config = dataclasses.replace(config, init_from=str(Path(configs[-1].output_dir) / "adapter"))
        configs.append(config)
    folders = [config.output_dir for config in configs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"`output_dir` is the same for several phases: {folders}.")
    return configs


def run(args: argparse.Namespace) -> None:
    configs = chain(args.config, args.overrides)
    if args.dry_run:
        for config in configs:
            print(dump_config(config))
        return
    for config in configs:
        missing = [n for n in ("pretrained", "shards", "output_dir") if not getattr(config, n)]
        if missing:
            raise ValueError(
                f"no value for {', '.join(f'`{n}`' for n in missing)}: give key=value on the command line."
            )
        if is_finished(config):
            logger.info("%s is finished, passed over", config.output_dir)
            continue
        from .trainer import Trainer

        Trainer(config).train()


def open_pack(pretrained: str | None):  # noqa: ANN201
    """The face pack of a pipeline folder, or None where none is given."""
    if not pretrained:
        return None
    from withanyone import FaceAnalyzer

    from .pack import PackReader

    return PackReader(FaceAnalyzer.from_pretrained(Path(pretrained) / "face_analyzer"))


def prepare(args: argparse.Namespace) -> None:
    """Builds catalogues and reference bank of the phases ahead of the runs that need them."""
    from .data import open_data

    for config in chain(args.config, args.overrides):
        pack = open_pack(config.pretrained)
        catalogues, bank = open_data(config, pack.analyzer if pack else None)
        for name, catalogue in catalogues.items():
            bad = catalogue.bad or "none"
            print(f"{name}: {len(catalogue)} records, {len(catalogue.kps)} faces, left out {bad}")
        if bank:
            print(f"bank: {len(bank)} photos of {len(bank.names)} people")


def check(args: argparse.Namespace) -> None:
    """Prints how many records of each kind are good, and the others by reason."""
    from .catalogue import SUBSETS, build_catalogue
    from .shards import REASONS, list_shards

    bad: Counter[str] = Counter()
    pack = open_pack(args.pretrained)
    for folder in SUBSETS["rec"]:
        shards = list_shards(f"{args.shards.rstrip('/')}/{folder}")
        catalogue = build_catalogue(shards, paired=folder in SUBSETS["cp"], pack=pack)
        bad.update(catalogue.bad)
        print(f"{folder}: {len(shards)} shards, {len(catalogue)} good records, {len(catalogue.kps)} faces")
    for reason, count in bad.most_common():
        print(f"{count:8d} {reason}: {REASONS[reason]}")


def references(args: argparse.Namespace) -> None:
    """Builds the reference bank, with the image features of every face crop if asked."""
    from .references import REFERENCE_TARS, build_bank, cache_features
    from .shards import list_shards

    pack = open_pack(args.pretrained)
    out = Path(args.out or Path(args.shards) / ".train_cache" / "bank")
    bank, bad = build_bank(list_shards(f"{args.shards.rstrip('/')}/{REFERENCE_TARS}"), out, pack=pack)
    print(f"{out}: {len(bank)} photos of {len(bank.names)} people; left out: {bad or 'none'}")
    if args.features:
        if pack is None:
            raise ValueError("`--features` needs `--pretrained`: the pipeline folder with the image encoder.")
        import torch
        from transformers import SiglipImageProcessor, SiglipVisionModel

        from withanyone.faces import crop_face

        encoder = SiglipVisionModel.from_pretrained(args.pretrained, subfolder="image_encoder").eval()
        processor = SiglipImageProcessor.from_pretrained(args.pretrained, subfolder="feature_extractor")

        @torch.no_grad()
        def encode(crops):  # noqa: ANN001, ANN202
            return encoder(processor(crops, return_tensors="pt").pixel_values).last_hidden_state.numpy()

        bank = cache_features(
            bank, out, encode, lambda photo, box: crop_face(photo, box, pack.analyzer.crop_size)
        )
        print(f"{out}: image features {bank.features.shape} {bank.features.dtype}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if argv and argv[0] == "check":
        parser = argparse.ArgumentParser(prog="python -m train check", description=check.__doc__)
        parser.add_argument("--shards", required=True, help="folder with train_rec, train_cp and ref")
        parser.add_argument("--pretrained", help="pipeline folder: its face pack stands in for missing .npy")
        check(parser.parse_args(argv[1:]))
        return
    if argv and argv[0] == "references":
        parser = argparse.ArgumentParser(prog="python -m train references", description=references.__doc__)
        parser.add_argument("--shards", required=True, help="folder with ref/tars")
        parser.add_argument("--out", help="the bank's folder; default: where a run looks for it")
        parser.add_argument("--pretrained", help="pipeline folder: its face pack finds faces without an .npy")
        parser.add_argument("--features", action="store_true", help="keep the face crops' image features")
        references(parser.parse_args(argv[1:]))
        return
    args = parse_phases(argv[1:] if argv[:1] == ["prepare"] else argv)
    (prepare if argv[:1] == ["prepare"] else run)(args)


def parse_phases(argv: list[str]) -> argparse.Namespace:
    """`--config FILE ... [key=value ...]`: what has an equals sign is an override, wherever it stands."""
    parser = argparse.ArgumentParser(
        prog="python -m train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", nargs="+", required=True, help="phase files, run in turn")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("overrides", nargs="*", default=[], help="key=value, for all phases")
    args, rest = parser.parse_known_args(argv)
    args.overrides += [item for item in (*args.config, *rest) if "=" in item]
    args.config = [item for item in args.config if "=" not in item]
    unknown = [item for item in rest if "=" not in item or item.startswith("-")]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    try:
        chain(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    main()
