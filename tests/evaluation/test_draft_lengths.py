"""How many tokens to draft: each shorter block as a draft of its own, and speeds worked out by hand."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import dflash, refused
from tiny_decoding import fitted_draft, random_prompts, tiny_target

from dflash_offline.pipeline.commands.evaluate import print_report
from dflash_offline.pipeline.pages.eval_page import write_eval_page
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.evaluation import Counted, EvalResult
from dflash_offline.schemas.results.draft_lengths import DraftLength, ServedCost, StepCosts
from dflash_offline.schemas.results.rounds import Acceptance
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.draft.decode import speculative_decode
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.evaluate import evaluate, evaluate_folder
from dflash_offline.stages.evaluation.costs import measure_costs
from dflash_offline.stages.evaluation.expected import FITTED, HERE, SCALED, expected_speeds
from dflash_offline.stages.evaluation.served_costs import round_seconds, saved_costs, step_seconds
from dflash_offline.stages.export import export
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.serving.measure import Pass
from dflash_offline.stages.train import train

LIMIT = 24


class Numbers:
    """Reads a prompt of numbers as the tokens that they are."""

    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, DraftModel, list[list[int]]]:
    """A random target, a draft that has seen its answers to two of the prompts, and those and another."""
    target, prompts = tiny_target("qwen3"), random_prompts(3)
    return target, fitted_draft(target, prompts[:2], steps=100), prompts


@pytest.fixture(scope="module")
def prompts_file(pair: tuple[Any, DraftModel, list[list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": " ".join(map(str, ids)), "kind": "ab"[i % 2]} for i, ids in enumerate(pair[2])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(path: Path, **changes: Any) -> EvalConfig:
    given = {"draft": Path("draft"), "target": "target", "prompts": path, "max_new_tokens": LIMIT}
    return EvalConfig(**(given | {"draft_lengths": True, "concurrency": (1, 3)} | changes))


@pytest.fixture(scope="module")
def result(pair: tuple[Any, DraftModel, list[list[int]]], prompts_file: Path) -> EvalResult:
    target, draft, _ = pair
    return evaluate(settings(prompts_file), target=target, tokenizer=Numbers(), draft=draft)


def another_block(draft: DraftModel, size: int) -> DraftModel:
    """Return a draft built anew for blocks of a size, with the same weights."""
    other = DraftModel(type(draft.config)(**(vars(draft.config) | {"block_size": size}))).eval()
    other.load_state_dict(draft.state_dict())
    return other


def test_every_length_is_what_a_draft_of_that_block_gives(
    pair: tuple[Any, DraftModel, list[list[int]]], result: EvalResult
) -> None:
    target, draft, prompts = pair
    assert result.draft_lengths is not None
    lengths = result.draft_lengths.lengths
    assert [one.num_speculative_tokens for one in lengths] == [1, 2, 3, 4, 5, 6, 7]
    for one in lengths:
        other = another_block(draft, one.num_speculative_tokens + 1)
        rounds = [speculative_decode(target, other, ids, LIMIT, ()).produced for ids in prompts]
        produced = [n for answer in rounds for n in answer]
        assert one.acceptance.rounds == len(produced)
        assert one.acceptance.pooled == pytest.approx(sum(produced) / len(produced))
        assert one.acceptance_by_kind["a"].rounds == len(rounds[0] + rounds[2])
        assert one.tokens_per_s
    assert lengths[-1].acceptance == result.acceptance
    assert len({one.acceptance.rounds for one in lengths}) > 4, "the lengths are to differ"


def test_a_shorter_block_is_a_pass_of_its_own_and_no_prefix(
    pair: tuple[Any, DraftModel, list[list[int]]], result: EvalResult
) -> None:
    """Cut out of whole blocks, a length would come to other rounds."""
    target, draft, prompts = pair
    assert result.draft_lengths is not None

    def cut(ids: list[int], number: int) -> int:
        text = [*ids, *speculative_decode(target, draft, ids, LIMIT, ()).tokens]
        states = target(torch.tensor([text]), output_hidden_states=True).hidden_states
        features = torch.cat([states[i + 1] for i in draft.config.target_layer_ids], dim=-1)
        rounds, at = 0, len(ids)
        while at < len(text) - 1:
            block = torch.full((1, 8), draft.config.mask_token_id)
            block[0, 0] = text[at]
            hidden = draft(
                position_ids=torch.arange(at + 8)[None],
                noise_embedding=target.get_input_embeddings()(block),
                target_hidden=features[:, :at],
            )
            drafted = target.get_output_embeddings()(hidden)[0, 1 : number + 1].argmax(dim=-1).tolist()
            right = 0
            while right < number and text[at + 1 : at + right + 2] == drafted[: right + 1]:
                right += 1
            at, rounds = at + right + 1, rounds + 1
        return rounds

    with torch.inference_mode():
        of_whole_blocks = [sum(cut(ids, n) for ids in prompts) for n in range(1, 8)]
    assert of_whole_blocks[-1] == result.acceptance.rounds
    assert of_whole_blocks != [one.acceptance.rounds for one in result.draft_lengths.lengths]


def test_the_report_and_the_page_say_what_to_draft(
    result: EvalResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result.draft_lengths
    assert found is not None and [one.concurrency for one in found.expected] == [1, 3]
    print_report(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[2:])) <= 80
    for one in found.expected:
        best = one.num_speculative_tokens
        assert one.tokens_per_s[best - 1] == max(one.tokens_per_s)
        assert one.speedup is not None
        said = f"at {one.concurrency} at a time draft {best}, {one.speedup[best - 1]:.2f} times plain decoding"
        assert any(line.startswith(said) for line in lines)
    (start,) = [i for i, line in enumerate(lines) if line.startswith("drafted  length")]
    for i, one in enumerate(found.lengths):
        assert lines[start + 1 + i].split()[:2] == [str(i + 1), f"{one.acceptance.pooled:.2f}"]
    document = json.loads(json.dumps(result.to_json()))["draft_lengths"]
    assert [one["num_speculative_tokens"] for one in document["lengths"]] == [1, 2, 3, 4, 5, 6, 7]
    write_eval_page(result, tmp_path / "page.html", lambda ids: " ".join(map(str, ids)))
    page = (tmp_path / "page.html").read_text()
    assert 'id="lengths"' in page and "draft ms at 3" in page
    assert f"At 3 at a time draft {found.expected[1].num_speculative_tokens}, " in page


def test_costs_are_those_of_the_steps_with_so_many_sequences(pair: tuple[Any, DraftModel, list[list[int]]]) -> None:
    """A target and a draft that take a known time at least for every token that they read."""
    target, draft, prompts = pair
    shapes = []

    def read(_: Any, arguments: Any) -> None:
        shapes.append(tuple(arguments[0].shape))
        time.sleep(0.002 * arguments[0].shape[1])

    hooks = [target.model.embed_tokens.register_forward_pre_hook(read)]
    hooks.append(draft.layers[0].mlp.register_forward_pre_hook(lambda _, x: time.sleep(0.001 * x[0].shape[1])))
    try:
        (costs,) = measure_costs(target, draft, prompts[0], 3, [5], Silent())
    finally:
        for hook in hooks:
            hook.remove()
    assert {rows for rows, _ in shapes} == {5}
    assert (costs.concurrency, costs.context_tokens) == (5, len(prompts[0]))
    assert costs.plain_s > 0.002 and len(costs.draft_s) == len(costs.verify_s) == 7
    for number, (drafted, verified) in enumerate(zip(costs.draft_s, costs.verify_s, strict=True), start=1):
        assert drafted > 0.001 * (number + 1) and verified > 0.002 * (number + 1)
    assert costs.round_s[3] == pytest.approx(costs.draft_s[3] + costs.verify_s[3])


def length(number: int, pooled: float, **kinds: float) -> DraftLength:
    def group(value: float) -> Acceptance:
        return Acceptance(prompts=2, rounds=10, tokens=round(10 * value), pooled=value, mean=value)

    by_kind = {kind: group(value) for kind, value in kinds.items()}
    return DraftLength(num_speculative_tokens=number, acceptance=group(pooled), acceptance_by_kind=by_kind)


LENGTHS = [length(1, 1.8, hard=1.2), length(2, 2.4, hard=1.3), length(3, 2.7, hard=1.3)]
STEPS = StepCosts(
    concurrency=4, context_tokens=9, plain_s=0.01, draft_s=(0.002, 0.002, 0.004), verify_s=(0.01, 0.013, 0.016)
)


def test_speeds_follow_from_the_steps_here() -> None:
    (found,) = expected_speeds(LENGTHS, [STEPS], [])
    assert (found.concurrency, found.costs) == (4, HERE)
    assert found.tokens_per_s == pytest.approx((4 * 1.8 / 0.012, 4 * 2.4 / 0.015, 4 * 2.7 / 0.020))
    assert found.speedup == pytest.approx((1.8 * 0.01 / 0.012, 2.4 * 0.01 / 0.015, 2.7 * 0.01 / 0.020))
    assert found.num_speculative_tokens == 2 and found.by_kind == {"hard": 1}


def served(number: int, seconds: float, plain: float | None = None) -> ServedCost:
    return ServedCost(concurrency=4, num_speculative_tokens=number, round_s=seconds, plain_step_s=plain)


def test_a_servers_rounds_at_two_numbers_are_a_line() -> None:
    (found,) = expected_speeds(LENGTHS, [STEPS], [served(1, 0.05, 0.04), served(3, 0.054), served(3, 0.050)])
    assert found.costs == FITTED and found.round_s == pytest.approx((0.05, 0.051, 0.052))
    assert found.speedup == pytest.approx((1.8 * 0.04 / 0.05, 2.4 * 0.04 / 0.051, 2.7 * 0.04 / 0.052))
    assert found.num_speculative_tokens == 3
    (falling,) = expected_speeds(LENGTHS, [], [served(1, 0.06), served(3, 0.04)])
    assert falling.round_s == pytest.approx((0.05, 0.05, 0.05)), "a longer block is never cheaper"
    (steep,) = expected_speeds(LENGTHS, [], [served(2, 0.01), served(3, 0.1)])
    assert min(steep.round_s) > 0 and steep.speedup is None and steep.num_speculative_tokens == 1


def test_a_servers_rounds_at_one_number_stretch_the_steps_here() -> None:
    (found,) = expected_speeds(LENGTHS, [STEPS], [served(3, 0.040, 0.015)])
    assert found.costs == SCALED and found.round_s == pytest.approx((0.024, 0.030, 0.040))
    assert found.speedup is not None and found.speedup[1] == pytest.approx(2.4 * 0.015 / 0.030)
    assert expected_speeds(LENGTHS, [], [served(3, 0.040)]) == ()
    both = expected_speeds(LENGTHS, [STEPS], [ServedCost(**(vars(served(3, 1.0)) | {"concurrency": 1}))])
    assert [(one.concurrency, one.costs) for one in both] == [(4, HERE)]


@pytest.fixture(scope="module", params=["dflash", "dflash2"])
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A draft that has learned a little of the cache."""
    folder = tmp_path_factory.mktemp("trained")
    config: dict[str, Any] = {"variant": request.param, "steps": 16, "draft_layers": 1, "learning_rate": 1e-2}
    config |= {"num_anchors": 16, "val_samples": 8, "optimizer": "muon", "device": "cpu"}
    train(TrainConfig(caches=(cache,), out=folder / "run", **config), Silent())
    return export(folder / "run", folder / "draft").draft


def test_a_cache_is_walked_with_every_shorter_block(trained: Path, cache: Path, tmp_path: Path) -> None:
    found = evaluate_folder(EvalConfig(draft=trained, cache=cache, device="cpu", limit=20, draft_lengths=True))
    assert found.draft_lengths is not None and found.draft_lengths.expected == ()
    assert "name --target, or give --speeds" in found.draft_lengths.notes[0]
    lengths = found.draft_lengths.lengths
    assert lengths[-1].acceptance == found.acceptance
    assert lengths[0].acceptance.tokens > lengths[0].acceptance.rounds, "something is to be accepted"
    for size in (2, 5, 8):
        other = Path(shutil.copytree(trained, tmp_path / str(size), ignore=shutil.ignore_patterns("checksums.json")))
        config = json.loads((other / "config.json").read_text())
        for place in (config, config.get("dflash_config", {})):
            if "block_size" in place:
                place["block_size"] = size
        (other / "config.json").write_text(json.dumps(config))
        alone = evaluate_folder(EvalConfig(draft=other, cache=cache, device="cpu", limit=20))
        assert alone.block_size == size and lengths[size - 2].acceptance == alone.acceptance


def result_of_a_server(path: Path, number: int, **changes: Any) -> Path:
    """Write what is read of a saved result with a live server."""
    one = {"concurrency": 1, "round_s": 0.01 + 0.001 * number, "plain_step_s": 0.008}
    group = {"pooled": 2.0, "mean": 2.0, "prompts": 3}
    found = {"acceptance": group, "trained": None, "config": {"temperature": 0.0}, "block_size": number + 1}
    found |= {"dtype": "x", "device": "the server", "service": {"num_speculative_tokens": number, "passes": [one]}}
    path.write_text(json.dumps(found | changes))
    return path


def test_saved_results_of_a_server_give_the_costs_of_a_walked_cache(trained: Path, cache: Path, tmp_path: Path) -> None:
    files = [result_of_a_server(tmp_path / f"{n}.json", n) for n in (2, 6)]
    flags = ["--cache", cache, "--draft-lengths", "--speeds", files[0], "--speeds", files[1], "--device", "cpu"]
    shown = dflash("eval", trained, *flags, "--json", "--quiet")
    (one,) = json.loads(shown.stdout)["draft_lengths"]["expected"]
    assert one["round_s"] == pytest.approx([0.01 + 0.001 * n for n in range(1, 8)])
    lengths = [length["acceptance"]["pooled"] for length in json.loads(shown.stdout)["draft_lengths"]["lengths"]]
    assert one["speedup"] == pytest.approx([a * 0.008 / s for a, s in zip(lengths, one["round_s"], strict=True)])
    assert one["num_speculative_tokens"] == 1 + max(range(7), key=one["speedup"].__getitem__)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {"temperature": 0.7}}, "was measured at temperature 0.7; expected 0.0"),
        ({"service": None}, "holds no rounds of a live server"),
        (
            {"service": {"num_speculative_tokens": 3, "passes": [{"concurrency": 1, "round_s": None}]}},
            "holds no rounds",
        ),
        ({"service": {"num_speculative_tokens": 3, "passes": [{"concurrency": 1, "round_s": -1}]}}, "round_s"),
        (
            {"trained": {"run": "b", "step": 3}},
            "was measured with another draft: run b, step 3; expected run a, step 3",
        ),
    ],
)
def test_a_saved_result_that_cannot_give_costs_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = result_of_a_server(tmp_path / "a.json", 3, **changes)
    config = EvalConfig(draft=Path("d"), cache=Path("c"), draft_lengths=True, speeds=(path,))
    with pytest.raises(DflashError, match=said):
        saved_costs(config, {"run": "a", "step": 3})


def test_settings_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    for flags, said in (
        (["--cache", "c", "--speeds", "a.json"], "Add --draft-lengths"),
        (["--prompts", prompts, "--server", "http://127.0.0.1:9", "--draft-lengths"], "draft_lengths drafts here"),
        (["--cache", "c", "--draft-lengths", "--concurrency", "4,4"], "concurrency names a number twice"),
        (["--cache", "c", "--draft-lengths", "--concurrency", "0"], "concurrency is 0; expected numbers from 1"),
    ):
        refused(dflash("eval", "draft", *flags), said)


def test_rounds_of_a_pass_share_its_seconds() -> None:
    answers: list[Any] = [SimpleNamespace(num_tokens=n) for n in (11, 6, 1)]

    def seconds(concurrency: int, **counted: Any) -> float | None:
        told = Counted(**({"acceptance_length": 3.0} | counted))
        return round_seconds(Pass(answers=answers, seconds=2.0, counted=told), concurrency)

    assert seconds(1, rounds=5) == pytest.approx(2.0 / 5)
    assert seconds(2, rounds=5) == pytest.approx(2.0 * 2 / 5)
    assert seconds(8, rounds=5) == pytest.approx(2.0 * 3 / 5), "no more are under way than there are"
    assert seconds(1, since_start=True) == pytest.approx(3.0 * 2.0 / 15)
    assert seconds(1, rounds=5, other_requests=1) is None
    assert round_seconds(Pass(answers=answers, seconds=2.0, counted=None), 1) is None
    assert step_seconds(Pass(answers=answers, seconds=2.0, counted=None), 2) == pytest.approx(2.0 * 2 / 15)
    assert step_seconds(Pass(answers=answers[2:], seconds=2.0, counted=None), 1) is None
