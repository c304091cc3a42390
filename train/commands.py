"""The small commands of `python -m train`: prepare, check, references, merge, settings."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from .catalogue import SUBSETS, build_catalogue, lock_of
from .config import TrainConfig, settings_table
from .data import open_bank_of, open_data
from .pack import PackReader
from .references import REFERENCE_TARS, build_bank, cache_features
from .shards import REASONS, list_shards


def open_pack(pretrained: str | None) -> PackReader | None:
    """The face pack of a pipeline folder, or None where none is given."""
    if not pretrained:
        return None
    from withanyone import FaceAnalyzer

    return PackReader(FaceAnalyzer.from_pretrained(Path(pretrained) / "face_analyzer"))


def prepare(configs: list[TrainConfig]) -> str:
    """Catalogues and reference bank of the phases, built ahead of the runs that need them."""
    lines = []
    for config in configs:
        pack = open_pack(config.pretrained)
        if config.streaming:  # no pass over the records
            catalogues, bank = {}, open_bank_of(config, pack if config.complete_records else None)
        else:
            catalogues, bank = open_data(config, pack.analyzer if pack else None)
        for name, catalogue in catalogues.items():
            bad = catalogue.bad or "none"
            lines.append(f"{name}: {len(catalogue)} records, {len(catalogue.kps)} faces, left out {bad}")
        if bank:
            lines.append(f"bank: {len(bank)} photos of {len(bank.names)} people")
    return "\n".join(lines)


# --- check -------------------------------------------------------------------------------------------------


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", required=True, help="folder with train_rec, train_cp and ref")
    parser.add_argument("--pretrained", help="pipeline folder: its face pack stands in for missing .npy")


def check(args: argparse.Namespace) -> str:
    """How many records of each kind are good, and the others by reason."""
    bad: Counter[str] = Counter()
    pack, lines = open_pack(args.pretrained), []
    for folder in SUBSETS["rec"]:
        shards = list_shards(f"{args.shards.rstrip('/')}/{folder}")
        catalogue = build_catalogue(shards, paired=folder in SUBSETS["cp"], pack=pack)
        bad.update(catalogue.bad)
        lines.append(
            f"{folder}: {len(shards)} shards, {len(catalogue)} good records, {len(catalogue.kps)} faces"
        )
    lines += [f"{count:8d} {reason}: {REASONS[reason]}" for reason, count in bad.most_common()]
    return "\n".join(lines)


# --- references --------------------------------------------------------------------------------------------


def add_references(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", required=True, help="folder with ref/tars")
    parser.add_argument("--out", help="the bank's folder; default: where a run looks for it")
    parser.add_argument("--pretrained", help="pipeline folder: its face pack finds faces without an .npy")
    parser.add_argument("--features", action="store_true", help="keep the face crops' image features")


def references(args: argparse.Namespace) -> str:
    """The reference bank, with the image features of every face crop if asked."""
    pack = open_pack(args.pretrained)
    if args.features and pack is None:
        raise ValueError("`--features` needs `--pretrained`: the pipeline folder with the image encoder.")
    out = Path(args.out or Path(args.shards) / ".train_cache" / "bank")
    shards = list_shards(f"{args.shards.rstrip('/')}/{REFERENCE_TARS}")
    with lock_of(out):
        bank, bad = build_bank(shards, out, pack=pack)
    said = f"{out}: {len(bank)} photos of {len(bank.names)} people; left out: {bad or 'none'}"
    if not args.features:
        return said
    import torch
    from transformers import SiglipImageProcessor, SiglipVisionModel

    from withanyone.faces import crop_face

    encoder = SiglipVisionModel.from_pretrained(args.pretrained, subfolder="image_encoder").eval()
    processor = SiglipImageProcessor.from_pretrained(args.pretrained, subfolder="feature_extractor")

    @torch.no_grad()
    def encode(crops: list[Image.Image]) -> np.ndarray:
        return encoder(processor(crops, return_tensors="pt").pixel_values).last_hidden_state.numpy()

    bank = cache_features(
        bank, out, encode, lambda photo, box: crop_face(photo, box, pack.analyzer.crop_size)
    )
    return f"{said}\nimage features {bank.features.shape} {bank.features.dtype}"


# --- merge -------------------------------------------------------------------------------------------------


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arc", required=True, help="folder of the arc adapter (a run's `adapter`)")
    parser.add_argument("--sig", required=True, help="folder of the sig adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged one")


def merge(args: argparse.Namespace) -> str:
    """One adapter of two branches that were trained apart, in both layouts."""
    from .trainer import merge_adapters

    merged = merge_adapters(args.arc, args.sig)
    merged.save_pretrained(args.out)
    merged.save_single_file(args.out / "withanyone.safetensors")
    return f"{args.out}: branches {', '.join(merged.branches)}"


# --- settings ----------------------------------------------------------------------------------------------


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", type=Path, help="put the table between the marks of this file instead")


BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def fill(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `table` between two marks."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the text needs the marks {begin} and {end}, once each and in this order.")
    return f"{text.split(begin)[0]}{begin}\n\n{table}\n{end}{text.split(end)[1]}"


def settings(args: argparse.Namespace) -> str:
    """The table of all settings with their defaults."""
    if args.write is None:
        return settings_table()
    args.write.write_text(fill(args.write.read_text(), settings_table()))
    return str(args.write)
