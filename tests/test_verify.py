"""Every kind of damage is found, named, and redone alone."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_target import save_target
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.config import ExtractConfig, RerunConfig
from dflash_offline.schemas.errors import CacheError, MismatchError
from dflash_offline.schemas.files import sealed_bytes
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.stages.cache import CacheReader
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.verify import compare_with_target, repair, verify_cache

HIDDEN = "features.zarr/hidden_states/c/{}/0/0"


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def test_a_sound_cache_has_no_fault(cache: Path) -> None:
    assert verify_cache(cache, Silent()) == []


def test_every_flipped_byte_of_every_file_is_found(copy: Path) -> None:
    chance = random.Random(0)
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for position in chance.sample(range(len(content)), 1):
            broken = bytearray(content)
            broken[position] ^= 1 << chance.randrange(8)
            path.write_bytes(broken)
            assert verify_cache(copy, Silent()), f"{path}, byte {position} of {len(content)}"
        path.write_bytes(content)
    assert verify_cache(copy, Silent()) == []


def test_a_reader_never_decodes_a_flipped_byte_silently(copy: Path) -> None:
    chance, path = random.Random(1), copy / HIDDEN.format(0)
    content = path.read_bytes()
    members = CacheReader(copy).samples.samples_of_shard(0).tolist()
    sound = [CacheReader(copy).read_codes(sample) for sample in members]
    for position in chance.sample(range(len(content)), 30):
        broken = bytearray(content)
        broken[position] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        refused = 0
        reader = CacheReader(copy)
        for sample, before in zip(members, sound, strict=True):
            try:
                np.testing.assert_array_equal(reader.read_codes(sample), before)
            except CacheError:
                refused += 1
        assert refused or _in_padding(reader, position)


def _in_padding(reader: CacheReader, position: int) -> bool:
    """Say whether a byte lies in a chunk that no sample uses."""
    layout = reader.manifest.layout
    shard = reader._shard(0)
    chunk = int(np.searchsorted(shard._index[:, 0], position, "right")) - 1
    slot = chunk // layout.num_layers * layout.chunk_tokens
    members = reader.samples.samples_of_shard(0)
    last = members[-1]
    return bool(slot >= reader.samples.start[last] + reader.samples.num_tokens[last])


def _swap(copy: Path) -> None:
    a, b = (copy / HIDDEN.format(shard) for shard in (0, 1))
    a.rename(copy / "x")
    b.rename(a)
    (copy / "x").rename(b)


def _truncate(copy: Path) -> None:
    path = copy / HIDDEN.format(1)
    path.write_bytes(path.read_bytes()[:-1])


def _drop_record(copy: Path) -> None:
    (copy / "commits/000001.json").unlink()


def _drop_file(copy: Path) -> None:
    (copy / "features.zarr/loss_mask/c/1").unlink()


def _lie_about_statistics(copy: Path) -> None:
    path = copy / "commits/000001.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    record["layers"][0]["mean"] += 0.5
    path.write_bytes(sealed_bytes(record))


@pytest.mark.parametrize("harm", [_swap, _truncate, _drop_record, _drop_file, _lie_about_statistics])
def test_repair_and_extract_redo_just_the_faulty_shards(
    cache: Path, copy: Path, extract_config: dict[str, object], harm: Callable[[Path], None]
) -> None:
    harm(copy)
    faults = verify_cache(copy, Silent())
    shards = repair(copy, faults)
    assert shards == ([0, 1] if harm is _swap else [1])
    assert extract(ExtractConfig(**extract_config, out=copy), Silent()).shards_written == len(shards)
    assert verify_cache(copy, Silent()) == []
    assert (copy / HIDDEN.format(1)).read_bytes() == (cache / HIDDEN.format(1)).read_bytes()


def test_a_damaged_chunk_is_named_with_shard_and_sample(copy: Path) -> None:
    path = copy / HIDDEN.format(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (fault,) = verify_cache(copy, Silent())
    assert fault.shard == 1 and fault.place == HIDDEN.format(1)
    assert "Sample " in fault.what and "chats.jsonl:" in fault.what and "layer" in fault.what


def test_the_target_run_again_fits_every_layer(cache: Path, target: Path) -> None:
    fits = compare_with_target(cache, RerunConfig(target=str(target), samples=4), Silent())
    assert [fit.layer_id for fit in fits] == [1, 2, 4]
    assert all(fit.error < 0.004 and not fit.fault for fit in fits)


def test_a_layer_that_is_off_by_one_is_said_to_be(
    target: Path, extract_config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dflash_offline.stages import capture as stage

    right = stage.run_captured
    monkeypatch.setattr(stage, "run_captured", lambda model, ids, layers: right(model, ids, [i + 1 for i in layers]))
    out = tmp_path / "cache"
    extract(ExtractConfig(**extract_config, out=out), Silent())
    assert verify_cache(out, Silent()) == []
    faults = [fit.fault for fit in compare_with_target(out, RerunConfig(target=str(target), samples=4), Silent())]
    assert all("off by +1" in fault for fault in faults)
    said = CliRunner().invoke(app, ["verify", str(out), "--target", str(target)])
    assert said.exit_code == 1 and "layer 1 is off by +1" in said.stdout and "Next: do not train" in said.stdout
    hint = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert f"dflash verify {out} --target" in hint  # no record shows it, so the first screen names what would


def test_another_target_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"target\.weights_sha256"):
        compare_with_target(cache, RerunConfig(target=str(save_target(tmp_path / "other", seed=3))), Silent())


def test_a_tokenizer_saved_with_truncation_and_padding_is_the_same_target(
    target: Path, cache: Path, extract_config: dict[str, object], tmp_path: Path
) -> None:
    saved = shutil.copytree(target, tmp_path / "saved")
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer))
    out = tmp_path / "cache"
    extract(ExtractConfig(**extract_config | {"target": str(saved)}, out=out), Silent())
    assert Manifest.read(out).identity == Manifest.read(cache).identity
    for made in (out, cache):
        compare_with_target(made, RerunConfig(target=str(saved), samples=1), Silent())


def test_the_command_exits_1_with_a_line_a_fault_and_0_when_sound(copy: Path) -> None:
    sound = CliRunner().invoke(app, ["verify", str(copy)])
    assert sound.exit_code == 0 and "is sound" in sound.stdout
    _drop_file(copy)
    broken = CliRunner().invoke(app, ["verify", str(copy), "--json"])
    assert broken.exit_code == 1
    (fault,) = json.loads(broken.stdout)["faults"]
    assert fault == {"place": "features.zarr/loss_mask/c/1", "what": "is missing", "shard": 1}


def test_repair_comes_before_the_target_is_run(copy: Path, target: Path) -> None:
    _drop_file(copy)
    result = CliRunner().invoke(app, ["verify", str(copy), "--target", str(target), "--repair"])
    assert result.exit_code == 1 and "Forgot shards 1" in result.stdout
    assert not (copy / "commits/000001.json").exists()


def test_a_sealed_document_of_another_kind_is_a_fault_and_no_crash(copy: Path) -> None:
    shutil.copy(copy / "manifest.json", copy / "commits/000001.json")
    (fault,) = verify_cache(copy, Silent())
    assert fault.shard == 1 and "no commit record of this format" in fault.what


def test_a_cache_copied_without_its_empty_folders_goes_on(copy: Path, extract_config: dict[str, object]) -> None:
    shutil.rmtree(copy / "tmp")
    config = ExtractConfig(**extract_config, out=copy)
    assert extract(config, Silent()).shards_written == 0
    (copy / "commits/000001.json").unlink()
    assert extract(config, Silent()).shards_written == 1


def test_impossible_numbers_of_samples_are_refused(copy: Path, target: Path) -> None:
    flags = ["--samples", "0", "--seed", "-1"]
    result = CliRunner().invoke(app, ["verify", str(copy), "--target", str(target), *flags])
    assert result.exit_code == 1 and "samples is 0; expected at least 1" in result.output
    assert "seed is -1; expected at least 0" in result.output


OWN_CODE = {
    "configuration_own.py": """
from transformers import Qwen3Config

class OwnConfig(Qwen3Config):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import Qwen3ForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
""",
}


def test_a_cache_of_a_target_with_its_own_code_is_verified_as_it_was_extracted(
    target: Path, extract_config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = shutil.copytree(target, tmp_path / "own")
    for name, code in OWN_CODE.items():
        (own / name).write_text(code)
    config = json.loads((own / "config.json").read_text())
    places = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": places}))
    out = tmp_path / "cache"
    settings = extract_config | {"target": str(own), "attn_implementation": "eager"}
    extract(ExtractConfig(**settings, out=out, trust_remote_code=True, limit=20), Silent())
    arguments = ["verify", str(out), "--target", str(own), "--samples", "2", "--quiet"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1 and "--trust-remote-code" in refused.output
    for more in ([], ["--attn-implementation", "sdpa", "--device", "cpu"]):
        sound = CliRunner().invoke(app, [*arguments, "--trust-remote-code", *more])
        assert sound.exit_code == 0 and "layer   4: relative error 0." in sound.stdout, sound.output
    (own / "modeling_own.py").write_text(OWN_CODE["modeling_own.py"] + "# changed\n")
    other = CliRunner().invoke(app, [*arguments, "--trust-remote-code"])
    assert other.exit_code == 1 and "target.code_sha256.modeling_own.py" in other.output
