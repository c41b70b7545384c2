"""Settings files: what is read, what is refused by name, and that flags go before the file."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.schemas.settings.toml import read_settings, to_toml
from dflash_offline.schemas.settings.train import TrainConfig


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_a_file_gives_fields_of_their_types(tmp_path: Path) -> None:
    text = 'caches = ["a", "b"]\nout = "run"\nlearning-rate = 1\nlayers = [1, 2]\nweights = [1, 0.5]\npacking = false\n'
    assert read_settings(write(tmp_path, text), TrainConfig) == {
        "caches": (Path("a"), Path("b")),
        "out": Path("run"),
        "learning_rate": 1.0,
        "layers": (1, 2),
        "weights": (1.0, 0.5),
        "packing": False,
    }


def test_every_unknown_key_and_wrong_type_is_named_at_once(tmp_path: Path) -> None:
    text = 'learning_rat = 1e-3\nzzz = 1\nsteps = "many"\nlayers = [1, 2.5]\npacking = 1\nout = 3\nepochs = true\n'
    with pytest.raises(DflashError) as refused:
        read_settings(write(tmp_path, text), TrainConfig)
    for part in (
        "learning_rat is no setting; did you mean learning_rate?",
        "zzz is no setting.",
        "steps is 'many'; expected a whole number.",
        "layers is [1, 2.5]; expected a whole number.",
        "packing is 1; expected true or false.",
        "out is 3; expected a path, as a string.",
        "epochs is True; expected a number.",
    ):
        assert part in str(refused.value), refused.value


def test_a_file_that_is_no_toml_or_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DflashError, match="is not TOML"):
        read_settings(write(tmp_path, "steps: 3\n"), TrainConfig)
    with pytest.raises(DflashError, match="cannot be read"):
        read_settings(tmp_path / "none.toml", TrainConfig)


def test_two_spellings_of_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DflashError, match="learning_rate stands there twice"):
        read_settings(write(tmp_path, "learning-rate = 1e-3\nlearning_rate = 2e-3\n"), TrainConfig)


def test_a_config_survives_being_written_and_read(tmp_path: Path) -> None:
    config = TrainConfig(
        caches=(tmp_path / 'a "quoted" \\ cache \x7f\t of Grüße 🦊',),
        out=tmp_path / "run",
        layers=(1, 2),
        ema=0.99,
        report_to="wandb",
    )
    assert TrainConfig(**read_settings(write(tmp_path, to_toml(config)), TrainConfig)) == config


def test_flags_go_before_the_file_and_the_file_before_the_defaults(cache: Path, tmp_path: Path) -> None:
    text = f'caches = ["{cache}"]\nsteps = 5\ndraft_layers = 1\nnum_anchors = 4\naccumulation = 2\n'
    path, run = write(tmp_path, text), tmp_path / "run"
    flags = ["train", "--config", str(path), "--out", str(run), "--steps", "2", "--accumulation", "1", "--quiet"]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    used = read_settings(run / "config.toml", TrainConfig)
    assert used["steps"] == 2 and used["draft_layers"] == 1 and used["num_anchors"] == 4 and used["accumulation"] == 1
    assert used["clip"] == TrainConfig.clip


def test_epochs_on_the_command_line_go_before_steps_of_the_file(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path, f'caches = ["{cache}"]\nsteps = 5\ndraft_layers = 1\nnum_anchors = 4\nval_samples = 0\n')
    for flags, steps in ((["--epochs", "0.01"], None), (["--epochs", "0.01", "--steps", "2"], 2)):
        run = tmp_path / f"run{steps}"
        result = CliRunner().invoke(app, ["train", "--config", str(path), "--out", str(run), *flags, "--quiet"])
        assert result.exit_code == 0, result.output
        used = TrainConfig(**read_settings(run / "config.toml", TrainConfig))
        assert (used.steps, used.epochs) == (steps, 0.01)


def test_what_is_set_nowhere_is_named() -> None:
    result = CliRunner().invoke(app, ["train", "--steps", "2"])
    assert result.exit_code == 1 and "Not set: caches, out." in result.stderr


def test_extract_reads_its_settings_from_a_file(target: Path, data: Path, tmp_path: Path) -> None:
    text = f'data = ["{data}"]\ntarget = "{target}"\nblock_size = 8\nnum_layers = 2\nshard-mib = 2\n'
    path = write(tmp_path, text + "[chat_template_kwargs]\ndeep = {list = [1, true]}\n")
    out = tmp_path / "cache"
    flags = ["extract", "--config", str(path), "--out", str(out), "--layers", "1,2,3", "--shard-mib", "1", "--quiet"]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    identity = Manifest.read(out).identity
    assert identity["chat_template_kwargs"] == {"deep": {"list": [1, True]}} and identity["block_size"] == 8
    assert identity["layer_ids"] == [1, 2, 3] and identity["layout"]["shard_mib"] == 1


def test_eval_reads_its_settings_from_a_file_and_a_flag_sets_aside_what_excludes_it(
    cache: Path, run: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, f'draft = "{run}"\ncache = "{cache}"\nlimit = 2\n')
    result = CliRunner().invoke(app, ["eval", "--config", str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["config"]["limit"] == 2
    result = CliRunner().invoke(app, ["eval", "--config", str(path), "--prompts", "a.jsonl"])
    assert "No target is given." in result.stderr and "Give either" not in result.stderr


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("extract", "max_lenght = 4\n", "max_lenght is no setting; did you mean max_length?"),
        ("regenerate", 'servers = "http://a"\n', "servers is 'http://a'; expected a list, each a string."),
        ("regenerate", "chat_template_kwargs = 3\n", "chat_template_kwargs is 3; expected a table of"),
        ("eval", "temperature = true\n", "temperature is True; expected a number."),
        ("regenerate", 'data = ["a"]\nout = "b"\nrests = 0\n', "rests is 0; expected at least 1."),
    ],
)
def test_what_a_file_says_wrong_is_refused_by_name(command: str, text: str, said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [command, "--config", str(write(tmp_path, text))])
    assert result.exit_code == 1 and said in result.stderr, result.stderr
