"""Settings: typed, checked, and printed whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

from train.__main__ import chain, main
from train.commands import BEGIN, END, fill
from train.config import PHASES, TrainConfig, dump_config, load_config, make_config, settings_table


def test_an_unknown_key_is_an_error_that_names_the_nearest_setting(tmp_path):
    with pytest.raises(ValueError, match="Did you mean `learning_rate`"):
        make_config({"learning_rat": 1e-4})
    (tmp_path / "phase.yaml").write_text("paired_ration: 0.5\n")
    with pytest.raises(ValueError, match="`paired_ration` .*Did you mean `paired_ratio`"):
        load_config(tmp_path / "phase.yaml")
    (tmp_path / "good.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match="Did you mean `num_negatives`"):
        load_config(tmp_path / "good.yaml", ["num_negative=3"])


def test_values_get_their_settings_type_whatever_yaml_makes_of_them(tmp_path):
    (tmp_path / "phase.yaml").write_text("learning_rate: 1e-4\nmixed_precision: no\nema_decay: null\n")
    config = load_config(tmp_path / "phase.yaml", ["max_train_steps=1e3", "buckets=[[64, 32]]"])
    assert config.learning_rate == 1e-4
    assert config.mixed_precision == "no"
    assert config.ema_decay is None
    assert config.max_train_steps == 1000 and isinstance(config.max_train_steps, int)
    assert config.buckets == [[64, 32]]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"paired_ratio": 1.5}, "paired_ratio"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"max_train_steps": 2.5}, "max_train_steps"),
        ({"contrastive_temperature": 0}, "contrastive_temperature"),
        ({"buckets": [[64]]}, "buckets"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing"),
        ({"count_prompts": ["one"]}, "count_prompts"),
        ({"shards": "hf://datasets/a/b"}, "cache_dir"),
        ({"num_negatives": 0}, "num_negatives"),
        ({"merge_from": ["a"]}, "merge_from"),
        ({"merge_from": ["a", "b"], "init_from": "c"}, "merge_from"),
        ({"best_metric": "sim"}, "best_metric"),
        ({"best_metric": "sim_gt"}, "best_metric"),
        ({"report_to": ["tensorbord"]}, "report_to"),
        ({"stream_lanes": 0}, "stream_lanes"),
    ],
)
def test_a_bad_value_is_refused_by_name(values, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        make_config(values)


def test_extends_takes_the_other_file_first(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\npaired_ratio: 0.25\n")
    (tmp_path / "next.yaml").write_text("extends: base.yaml\npaired_ratio: 0.5\n")
    config = load_config(tmp_path / "next.yaml")
    assert (config.seed, config.paired_ratio) == (1, 0.5)


@pytest.mark.parametrize("path", sorted(PHASES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_phase_file_resolves(path):
    assert isinstance(load_config(path), TrainConfig)


def test_the_papers_numbers_stand_in_the_flux_phases():
    configs = [load_config(PHASES / f"phase_{n}.yaml") for n in (1, 2, 3, 4)]
    for config in configs:
        assert (config.id_loss_weight, config.contrastive_loss_weight) == (0.1, 0.1)
        assert (config.contrastive_temperature, config.num_negatives) == (0.1, 4096)
        assert (config.learning_rate, config.text_dropout, config.id_loss_max_sigma) == (1e-4, 0.1, 0.6)
    assert [c.prompt_source for c in configs] == ["count", "caption", "caption", "caption"]
    assert [c.paired_ratio for c in configs[:3]] == [0, 0, 0.5]
    assert configs[0].max_train_steps == 20_000


def test_dry_run_prints_the_whole_resolved_config(capsys):
    main(["--config", "phase_3.yaml", "seed=7", "--dry-run"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load(dump_config(load_config("phase_3.yaml", ["seed=7"])))
    assert printed["seed"] == 7 and len(printed) > 50


def test_an_unknown_key_stops_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["--config", "phase_1.yaml", "--dry-run", "sed=7"])
    assert "Did you mean `seed`" in capsys.readouterr().err


def test_phases_run_in_turn_go_on_from_one_another(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(f"output_dir: runs/{name}\n")
    first, second = chain([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], [])
    assert first.init_from is None
    assert second.init_from == "runs/a/adapter"
    with pytest.raises(ValueError, match="`output_dir`"):
        chain([str(tmp_path / "a.yaml")] * 2, [])


def test_the_readmes_table_of_settings_is_the_programs():
    """`python -m train settings --write train/README.md` renews it."""
    text = (PHASES.parent / "README.md").read_text()
    shown = text.split(BEGIN)[1].split(END)[0].strip()
    assert shown == settings_table().strip()
    for item in dataclasses.fields(TrainConfig):
        assert f"| `{item.name}` |" in shown


def test_the_settings_table_is_put_between_its_marks(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(["settings", "--write", str(path)])
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert "| `learning_rate` | `0.0001` |" in text
    with pytest.raises(ValueError, match="marks"):
        fill("no marks", "x")


ACCELERATE = sorted((PHASES.parent / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_takes_our_configuration_files(path, monkeypatch):
    """Loaded as `accelerate launch` loads them (it refuses unknown keys), and the plugins made of them."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin, launch

    arguments = ["--config_file", str(path), "-m", "train", "--config", "phase_1.yaml"]
    args = launch_command_parser().parse_args(arguments)
    args, _, _ = _validate_launch_command(args)
    assert args.mixed_precision == "bf16" and args.training_script == "train"
    expected = {"one_gpu": (False, False, 1), "ddp": (False, False, 8), "fsdp2": (True, False, 8),
                "deepspeed_zero2": (False, True, 8)}  # fmt: skip
    assert (args.use_fsdp, args.use_deepspeed, args.num_processes) == expected[path.stem]
    if path.stem == "fsdp2":
        for name, value in launch.prepare_multi_gpu_env(args).items():
            if name.startswith("FSDP_"):
                monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        plugin.set_auto_wrap_policy(torch.nn.Linear(2, 2))
        assert plugin.auto_wrap_policy is None  # the adapter is one unit
    if path.stem == "deepspeed_zero2":
        assert args.zero_stage == 2 and args.offload_param_device == "none"


def test_all_four_configurations_are_there():
    assert [path.stem for path in ACCELERATE] == ["ddp", "deepspeed_zero2", "fsdp2", "one_gpu"]
