"""Compiled target layers: the same features but for their last bits, recorded, and refused by name where they fail."""

import copy
from pathlib import Path

import pytest
import torch
from cache_files import content, made_otherwise, set_field
from running import Settings
from torch._dynamo import config as compiler
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from dflash_offline.pipeline.demo import TARGET
from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.manifest import Manifest, is_compiled
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.capture.compare import compare_with_target
from dflash_offline.stages.capture.inputs import open_inputs
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target.compiled import compile_layers
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import layer_states, load_model

CPU = torch.device("cpu")
SHAPES = [(3, 100), (1, 90), (8, 8), (1, 300), (61, 61), (2, 64), (5, 160)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself while it traces
def test_compiled_layers_give_the_eager_features_and_are_compiled_once_for_all_lengths() -> None:
    files = open_target(str(TARGET))
    eager = load_model(files, dtype=torch.float32, device=CPU)
    compiled, last = copy.deepcopy(eager), [1, 4, 6]
    torch._dynamo.reset()
    counters.clear()
    compile_layers(compiled, files, last, 512)
    with compiler.patch(error_on_recompile=True):
        for seed, shape in enumerate(SHAPES):
            ids = torch.randint(10, 1400, shape, generator=torch.Generator().manual_seed(seed))
            for found, wanted in zip(*(layer_states(model, ids, last) for model in (compiled, eager)), strict=True):
                assert (found - wanted).norm() <= 2e-6 * wanted.norm()
    # Whatever the number of layers: one graph for a single sequence, one for several.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_cache_is_the_same_from_any_process_and_close_to_the_target_run_plainly(
    extract_config: Settings, target: Path, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "one", tmp_path / "two"
    extract(ExtractConfig(**extract_config, out=alone, compile=True), Silent())
    for rank, asked in ((0, True), (1, None)):
        torch._dynamo.reset()  # what the second rank compiles, it compiles for itself; it takes over that it does
        extract(ExtractConfig(**extract_config, out=shared, compile=asked, rank=rank, world_size=2), Silent())
    assert content(shared) == content(alone)
    fits = compare_with_target(alone, RerunConfig(target=str(target), samples=4), Silent())
    assert [fit.fault for fit in fits] == ["", "", ""] and all(fit.error < 0.003 for fit in fits)
    with pytest.raises(MismatchError, match=r"compiled +cache: each decoder layer by torch\.compile  now: \(absent\)"):
        extract(ExtractConfig(**extract_config, out=alone, compile=False), Silent())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_layers_that_cannot_be_compiled_are_refused_with_how_to_go_without(
    extract_config: Settings, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", compile=True)
    refused = pytest.raises(DflashError, match=r"cannot compile the layers of .*no-such-compiler.*--no-compile")
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}), refused:
        extract(config, Silent())
    assert not config.out.exists()


def test_a_begun_cache_goes_on_as_it_was_made(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    compiled = made_otherwise(cache, tmp_path / "compiled", set_field("identity/compiled", "as then"))
    for made, is_so in ((cache, False), (compiled, True)):
        asked = open_inputs(ExtractConfig(**extract_config, out=made), Silent()).identity
        assert is_compiled(asked) == is_so == is_compiled(Manifest.read(made).identity)


def test_a_target_spread_over_devices_is_not_compiled(extract_config: Settings, tmp_path: Path) -> None:
    with pytest.raises(DflashError, match="its layers cannot be compiled"):
        ExtractConfig(**extract_config, out=tmp_path, device_map="auto", compile=True)
