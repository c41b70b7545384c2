"""How many tokens `dflash eval --draft-lengths` advises to draft, against a real vLLM that drafts every number."""

import json
import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from live_vllm import embedded_run, launch_line, served

from dflash_offline.pipeline.demo import PROMPTS, TARGET
from dflash_offline.schemas.evaluation import EvalResult
from dflash_offline.schemas.results.draft_lengths import DraftLengths
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.eval_served import evaluate_served
from dflash_offline.stages.evaluate import evaluate_folder
from dflash_offline.stages.export import export

pytestmark = pytest.mark.vllm
NUM_PROMPTS = min(int(os.environ.get("DFLASH_VLLM_PROMPTS", "40")), 40)
NUMBERS = range(1, 8)
AT_ONCE = (1, 8)
TURNS = 9
"""Times that every server is measured, in turn; the costs are of the first four, the speeds of the others."""
FITTED_TO = (1, 4, 7)
"""Numbers of drafted tokens whose servers give the costs: their line has to tell the others."""
SMALL = ["--num-gpu-blocks-override", "64"]
"""Room for eight answers: seven servers stand side by side."""


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths")
    return export(embedded_run(folder, draft_layers=3), folder / "draft").draft


@pytest.fixture(scope="module")
def servers(draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, str]]:
    """Serve the draft with every number of drafted tokens; yields the URL of each."""
    folder, line = tmp_path_factory.mktemp("servers"), launch_line(draft)
    with ExitStack() as running:
        urls = {}
        for number in NUMBERS:
            words = [
                word.replace('"num_speculative_tokens": 7', f'"num_speculative_tokens": {number}') for word in line
            ]
            urls[number] = running.enter_context(served([*words, *SMALL], folder / f"{number}.log"))
        yield urls


def measured(draft: Path, url: str) -> EvalResult:
    config = EvalConfig(draft=draft, server=url, prompts=PROMPTS, limit=NUM_PROMPTS, concurrency=AT_ONCE)
    return evaluate_served(config)


@pytest.fixture(scope="module")
def turns(draft: Path, servers: dict[int, str]) -> list[dict[int, EvalResult]]:
    """Return what each server gives each time; they take turns at being first, after one turn that is not counted."""
    found = []
    for turn in range(TURNS + 1):
        order = [NUMBERS[(turn + i) % len(NUMBERS)] for i in range(len(NUMBERS))]
        found.append({number: measured(draft, servers[number]) for number in order})
    return found[1:]


@pytest.fixture(scope="module")
def advice(draft: Path, turns: list[dict[int, EvalResult]], tmp_path_factory: pytest.TempPathFactory) -> DraftLengths:
    """Return the advice whose costs come from some servers' first turns; the speeds it is held to are of the others."""
    folder, files = tmp_path_factory.mktemp("saved"), []
    for turn, results in enumerate(turns[: TURNS // 2]):
        for number in FITTED_TO:
            files.append(folder / f"{number}-{turn}.json")
            files[-1].write_text(json.dumps(results[number].to_json()))
    config = EvalConfig(
        **{"draft": draft, "target": str(TARGET), "prompts": PROMPTS, "limit": NUM_PROMPTS, "dtype": "float32"},
        **{"draft_lengths": True, "concurrency": AT_ONCE, "speeds": tuple(files), "device": "cpu"},
    )
    found = evaluate_folder(config).draft_lengths
    assert found is not None
    return found


def test_every_number_gives_the_rounds_that_were_foretold(
    turns: list[dict[int, EvalResult]], advice: DraftLengths
) -> None:
    for length in advice.lengths:
        service = turns[0][length.num_speculative_tokens].service
        assert service is not None and service.num_speculative_tokens == length.num_speculative_tokens
        for one in service.passes:
            assert one.counted is not None and one.counted.rounds == length.acceptance.rounds


def speed(result: EvalResult, concurrency: int) -> float:
    assert result.service is not None
    (found,) = [one.tokens_per_s for one in result.service.passes if one.concurrency == concurrency]
    return found


@pytest.mark.parametrize("concurrency", AT_ONCE)
def test_the_number_that_is_advised_is_within_5_percent_of_the_fastest(
    turns: list[dict[int, EvalResult]], advice: DraftLengths, concurrency: int
) -> None:
    relative: dict[int, list[float]] = {number: [] for number in NUMBERS}
    for results in turns[TURNS // 2 :]:
        speeds = {number: speed(results[number], concurrency) for number in NUMBERS}
        for number in NUMBERS:  # within a turn, so that a slower minute is one for all
            relative[number].append(speeds[number] / statistics.fmean(speeds.values()))
    live = {number: statistics.median(each) for number, each in relative.items()}
    (one,) = [one for one in advice.expected if one.concurrency == concurrency]
    assert live[one.num_speculative_tokens] >= 0.95 * max(live.values()), (one, live)
