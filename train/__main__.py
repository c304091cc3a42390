"""Command line of training: `python -m train --config PHASE.yaml [PHASE.yaml ...] [key=value ...]`.

Several phases run in turn, each going on from the last one's adapter. The same command again goes on where
the run was; a finished phase is passed over.

Other commands (each has --help):
    prepare --config ...   catalogues and reference bank, built ahead of the run
    check                  how many records of a folder of shards are good, the others by reason
    references             the reference bank alone, with image features if asked
    own-data               own photos (a folder a person, and group photos) as shards
    stylise                phase 4's stylised variants, made by the model
    merge                  an arc and a sig adapter that were trained apart, as one
    memory                 what a run needs on each GPU, computed
    settings               the table of all settings
    release                a model repository of a run, checked and pushed (python -m train.release)
    reproduce              the claim's rows on the miniature (python -m train.reproduce)
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import sys
from pathlib import Path

from .config import TrainConfig, dump_config, load_config

logger = logging.getLogger("train")

#: Command -> (module, function that adds arguments, function that runs and returns what to print)
COMMANDS = {
    "check": ("commands", "add_check", "check"),
    "references": ("commands", "add_references", "references"),
    "merge": ("commands", "add_merge", "merge"),
    "settings": ("commands", "add_settings", "settings"),
    "own-data": ("own_data", "add_arguments", "run"),
    "stylise": ("stylise", "add_arguments", "run"),
    "memory": ("memory", "add_arguments", "run"),
    "release": ("release", "add_arguments", "run"),
    "reproduce": ("reproduce", "add_arguments", "run"),
}


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
        if configs and config.init_from is None and not config.merge_from:
            config = dataclasses.replace(config, init_from=str(Path(configs[-1].output_dir) / "adapter"))
        configs.append(config)
    folders = [config.output_dir for config in configs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"`output_dir` is the same for several phases: {folders}.")
    return configs


def train(configs: list[TrainConfig]) -> None:
    """Runs the phases that are not finished."""
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


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if argv and argv[0] in COMMANDS:
        print(run_command(argv[0], argv[1:]))
        return
    is_prepare = argv[:1] == ["prepare"]
    args, configs = parse_phases(argv[1:] if is_prepare else argv)
    if is_prepare:
        from .commands import prepare

        print(prepare(configs))
    elif args.dry_run:
        for config in configs:
            print(dump_config(config))
    else:
        train(configs)


def run_command(name: str, argv: list[str]) -> str:
    """Runs one of `COMMANDS`; a wrong argument ends it as the command line's own errors do."""
    module, add_arguments, run = COMMANDS[name]
    module = importlib.import_module(f"train.{module}")
    about = (getattr(module, run).__doc__ or module.__doc__).strip().splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m train {name}", description=about)
    getattr(module, add_arguments)(parser)
    args = parser.parse_args(argv)
    try:
        return getattr(module, run)(args)
    except ValueError as error:
        parser.error(str(error))


def parse_phases(argv: list[str]) -> tuple[argparse.Namespace, list[TrainConfig]]:
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
        return args, chain(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
