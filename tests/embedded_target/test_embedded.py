"""The embedded target: its folder, its template, the conversations it ships with, and their generator."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded_target.conversations import KINDS, Conversation, Split, check, generate
from embedded_target.measure import answer, likelihood, load, table, tally
from embedded_target.target_tokenizer import MASK, SPECIAL, TURN_END, VOCAB_SIZE, train_tokenizer
from embedded_target.train_target import Recipe, batches, rate, weighted_loss, work

from dflash_offline.pipeline.demo import CONVERSATIONS, PROMPTS, TARGET
from dflash_offline.schemas.files import sha256_file
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.regenerate import regenerate
from dflash_offline.stages.target.files import open_target

MAX_WEIGHT_BYTES = 6_000_000
MAX_CONVERSATIONS_BYTES = 4_000_000


def drawn(split: Split, num: int, seed: int = 7) -> list[Conversation]:
    return list(islice(generate(split, seed), num))


def first_prompts(conversations: list[dict[str, Any]]) -> set[str]:
    return {next(m["content"] for m in one["messages"] if m["role"] == "user") for one in conversations}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The shipped model in float32 and its tokenizer."""
    return load(TARGET)


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict[str, Any]]]:
    """The shipped conversations of each split."""
    files = {"train": CONVERSATIONS, "heldout": PROMPTS}
    return {split: [json.loads(line) for line in file.read_text().splitlines()] for split, file in files.items()}


def test_target_folder_loads_and_is_small(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert (TARGET / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES
    assert model.config.model_type == "qwen3" and model.config.num_hidden_layers == 10
    assert len(tokenizer) == VOCAB_SIZE == model.get_input_embeddings().weight.shape[0]
    assert tokenizer.eos_token == TURN_END and tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_tokenizer_gives_back_any_text_and_splits_digits(loaded: tuple[Any, Any]) -> None:
    text = 'Zoë paid 1234 euros:\n\n\t{"a": [1, 2]}  ☂'
    ids = loaded[1].encode(text)
    assert loaded[1].decode(ids) == text
    assert loaded[1].tokenize("1234") == ["1", "2", "3", "4"]


def test_special_tokens_are_the_first_ids_and_no_words_give_them(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    assert set(SPECIAL) == set(tokenizer.all_special_tokens)
    assert tokenizer.mask_token == MASK


def test_template_renders_turn_by_turn_as_a_prefix(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    for one in drawn("heldout", 100):
        messages, before = list(one.messages), ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
                assert asked.startswith(before)
                before = asked
            rendered = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            assert rendered.startswith(before)
            before = rendered


def test_generation_mask_decodes_to_the_answers_and_their_ends_of_turn(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    for one in drawn("heldout", 200):
        encoded = tokenizer.apply_chat_template(
            list(one.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, said = encoded["input_ids"], encoded["assistant_masks"]
        answers = [message["content"] + TURN_END for message in one.messages if message["role"] == "assistant"]
        assert tokenizer.decode([i for i, mine in zip(ids, said, strict=True) if mine]) == "".join(answers)
        assert len(ids) <= 400


def test_tokens_of_a_prompt_are_a_prefix_of_the_tokens_of_the_conversation(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    for one in drawn("heldout", 100):
        prompt = tokenizer.apply_chat_template(
            list(one.messages[:-1]), tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"]
        whole = tokenizer.apply_chat_template(list(one.messages), tokenize=True, return_dict=True)["input_ids"]
        assert whole[: len(prompt)] == prompt


def test_shipped_files_hold_every_kind_in_whole_turns(shipped: dict[str, list[dict[str, Any]]]) -> None:
    assert CONVERSATIONS.stat().st_size <= MAX_CONVERSATIONS_BYTES
    for conversations in shipped.values():
        assert {one["kind"] for one in conversations} == set(KINDS)
        for one in conversations:
            roles = [message["role"] for message in one["messages"] if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(message["content"].strip() for message in one["messages"])


def test_shipped_files_hold_no_special_token(shipped: dict[str, list[dict[str, Any]]], loaded: tuple[Any, Any]) -> None:
    texts = [m["content"] for split in shipped.values() for one in split for m in one["messages"]]
    assert not any(token in text for text in texts for token in SPECIAL)
    assert min(min(ids) for ids in loaded[1](texts)["input_ids"]) >= len(SPECIAL)


def test_no_held_out_prompt_is_a_training_prompt(shipped: dict[str, list[dict[str, Any]]]) -> None:
    assert not first_prompts(shipped["train"]) & first_prompts(shipped["heldout"])
    train, heldout = ([one.record() for one in drawn(split, 5000)] for split in ("train", "heldout"))
    assert not first_prompts(train) & first_prompts(heldout)
    assert not first_prompts(train) & first_prompts(shipped["heldout"])


def test_generator_is_a_function_of_split_and_seed() -> None:
    assert drawn("train", 300) == drawn("train", 300)
    assert drawn("train", 300) != drawn("train", 300, seed=8)
    assert {one.kind for one in drawn("train", 300)} == set(KINDS)


def test_prompts_of_every_kind_hardly_repeat() -> None:
    prompts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for one in drawn("train", 7000):
        prompts[one.kind].append(next(m["content"] for m in one.messages if m["role"] == "user"))
    for kind, texts in prompts.items():
        assert len(set(texts)) >= 0.97 * len(texts), kind


def test_reference_answers_pass_their_own_check_and_mutations_do_not() -> None:
    for one in drawn("train", 2000):
        for i, message in enumerate(one.messages):
            if message["role"] == "assistant":
                assert check(one, i, message["content"]) == (True, True), one
                assert not check(one, i, message["content"][:-3])[1], one
                assert check(one, i, "I do not know.") == (False, False), one


def test_shipped_answers_are_the_greedy_ones_and_likely(
    loaded: tuple[Any, Any], shipped: dict[str, list[dict[str, Any]]]
) -> None:
    model, tokenizer = loaded
    free = ("letter", "story")  # where two words may all but tie, and another machine may prefer the other
    for one in [one for one in shipped["heldout"] if one["kind"] not in free][:6]:
        prompt = tokenizer.apply_chat_template(
            one["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**prompt, max_new_tokens=256, output_logits=True, return_dict_in_generate=True)
        new = made.sequences[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(new) == one["messages"][-1]["content"] + TURN_END
        chosen = [-step[0].log_softmax(-1)[token].item() for step, token in zip(made.logits, new, strict=True)]
        assert likelihood(model, tokenizer, one["messages"])[-len(new) :] == pytest.approx(chosen, abs=1e-3)


@pytest.mark.parametrize(("file", "split", "seed"), [(CONVERSATIONS, "train", 1), (PROMPTS, "heldout", 2)])
def test_shipped_files_are_what_regenerating_the_generated_ones_made(
    file: Path, split: Split, seed: int, shipped: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    made = json.loads(Path(f"{file}.provenance").read_text())
    assert made["sha256"] == sha256_file(file)
    identity = open_target(str(TARGET)).identity()
    for name in ("config_sha256", "weights_sha256", "chat_template_sha256"):
        assert made["identity"]["target"][name] == identity[name]
    assert made["identity"]["temperature"] == 0 and made["counts"]["left_out"] == {}
    references = tmp_path / "conversations.jsonl"
    rows = [one.record() for one in drawn(split, len(shipped[split]), seed)]
    references.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert made["identity"]["data"] == {"file_0_sha256": sha256_file(references)}
    out = tmp_path / "new.jsonl"
    few = {"data": (references,), "out": out, "limit": 12, "max_new_tokens": 256, "device": "cpu"}
    regenerate(RegenerateConfig(**few, target=str(TARGET)))
    new = [json.loads(line) for line in out.read_text().splitlines()]
    free = ("letter", "story")  # as below
    pairs = zip(new, shipped[split], strict=False)
    assert len(new) == 12 and all(a["messages"] == b["messages"] or a["kind"] in free for a, b in pairs)


@pytest.mark.slow
def test_target_answers_held_out_prompts_in_form_and_often_right() -> None:
    counts = tally(TARGET, drawn("heldout", 56))
    total = counts["all"]
    assert total.well_formed >= 0.9 * total.answers and total.correct >= 0.7 * total.answers, table(counts)
    assert sum(counts[kind].answers for kind in counts if kind != "all") == total.answers


def test_a_conversation_with_an_answer_that_does_not_end_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = drawn("heldout", 8)
    monkeypatch.setattr("embedded_target.measure.MAX_NEW_TOKENS", 45)
    ended = [messages is not None for messages in answer(TARGET, conversations)]
    assert any(ended) and not all(ended)
    total = tally(TARGET, conversations)["all"]
    turns = [sum(message["role"] == "assistant" for message in one.messages) for one in conversations]
    assert total.answers == sum(turns)
    assert total.well_formed <= sum(num for num, whole in zip(turns, ended, strict=True) if whole) and total.tokens


@pytest.mark.parametrize("module", ["conversations", pytest.param("train_target", marks=pytest.mark.slow)])
def test_the_commands_of_the_makefile_start_and_write(module: str, tmp_path: Path) -> None:
    flags = {"conversations": ["--num", "50", "--split", "train"], "train_target": ["--steps", "2", "--processes", "1"]}
    out = tmp_path / "out"
    command = [sys.executable, "-m", f"embedded_target.{module}", "--out", str(out), "--seed", "1", *flags[module]]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, check=True, env=environment)
    if module == "train_target":
        assert json.loads((out / "recipe.json").read_text())["steps_done"] == 2
        assert len(load(out)[1]) == VOCAB_SIZE
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert rows == [one.record() for one in drawn("train", 50, 1)]


def test_batches_weigh_answers_fully_prompts_a_little_and_padding_not_at_all(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    recipe = Recipe(steps=1, seed=3, pool=64, batch_tokens=1024)
    stream = batches(tokenizer, recipe)
    weights: Counter[float] = Counter()
    for ids_BS, weights_BS in islice(stream, 4):
        assert ids_BS.numel() <= recipe.batch_tokens
        assert torch.equal(weights_BS == 0, ids_BS == tokenizer.pad_token_id)
        weights.update(weights_BS.flatten().tolist())
    assert {round(weight, 3) for weight in weights} == {0.0, recipe.prompt_weight, 1.0}
    assert weighted_loss(model, ids_BS, weights_BS) < weights_BS.sum()


def test_rate_warms_up_and_ends_near_zero() -> None:
    recipe = Recipe(steps=1000, seed=0)
    rates = [rate(step, recipe) for step in range(recipe.steps)]
    peak = rates.index(max(rates))
    assert peak == recipe.warmup_steps - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.9 < max(rates) <= 1 and rates[-1] < 1e-4


@pytest.mark.slow
def test_two_processes_train_the_same_target_as_one(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    recipe = Recipe(steps=8, seed=0, pool=64, batch_tokens=512, warmup_steps=1)
    models = []
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        loaded[1].save_pretrained(folder)
        meeting = str(tmp_path / f"group{num_processes}")
        torch.multiprocessing.spawn(work, (num_processes, meeting, recipe, folder), nprocs=num_processes)
        models.append(load(folder)[0])
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0) > 0.99, name


def test_tokenizer_training_refuses_texts_that_are_too_few() -> None:
    with pytest.raises(ValueError, match="need more varied texts"):
        train_tokenizer(["one", "two"])
