"""The plan made in batches and processes says what the plain one says, row by row, on anything."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from chat_templates import SHAPES
from data_rows import BAD, one, write_arrow
from plain_plan import plain_plan
from processes import children, is_running
from tiny_target import conversations, save_tokenizer
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations import tokenize
from dflash_offline.stages.conversations.content import Chat
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.plan import Plan, make_plan
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.conversations.tokenize import RowTokenizer, batches, tokenize_rows, unparsed
from dflash_offline.stages.target.files import TargetFiles

WORDS = [
    *"the cat sees a red dog, e\u0301 \u00e9t\u00e9 \uac00 \u1100\u1161 \U0001f600 \u4e2d\u6587".split(),
    *("\n\n", "\u202e\x1b[0m", "\x00", "\ufb01", "\u0344\u0323o\u0308", "\r\n\t"),
    *("<think>\nno\n</think>", "[x]", "<|im"),
]


def target(folder: Path, shape: str = "none", change: str = "") -> TargetFiles:
    """Return the files of a target whose tokenizer has a template of that shape and a change that some models have."""
    template, special, eos = SHAPES[shape]
    tokenizer = save_tokenizer(folder, template, special=special, eos=eos)
    backend: Tokenizer = tokenizer.backend_tokenizer
    if change == "NFC":
        backend.normalizer = normalizers.NFC()
    elif change == "lowercase":
        backend.normalizer = normalizers.Lowercase()
    elif change == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "trimmed":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    elif change == "begin token":
        begin = (special[1], backend.token_to_id(special[1]))
        backend.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    elif change == "no letters":
        document = json.loads(backend.to_str())
        flags = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": True, "special": False}
        document["added_tokens"].append({"id": 390, "content": "cat", **flags})
        backend = Tokenizer.from_str(json.dumps(document))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=template).save_pretrained(folder)
    made = AutoTokenizer.from_pretrained(folder)
    config = Qwen3Config(vocab_size=400, eos_token_id=made.eos_token_id)
    return TargetFiles(folder=folder, name=shape, config=config, tokenizer=made, template=template)


def nested(depth: int) -> str:
    """Return JSON of lists within lists, deeper than the json module would write it."""
    return "[" * depth + "]" * depth


def hostile_rows(count: int, seed: int = 0) -> list[bytes]:
    """Return lines of every row format, good and bad, some of them again and again."""
    chance = random.Random(seed)
    bad = [write for name, (write, _) in BAD.items() if not name.startswith("deep")]

    def words(most: int = 30) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randrange(1, most)))

    def chat() -> dict[str, Any]:
        roles = ["user", "assistant"] * chance.randrange(1, 4)
        turns: list[dict[str, Any]] = [{"role": role, "content": words()} for role in roles]
        changes = [
            lambda: turns.insert(0, {"role": "system", "content": words(5)}),
            lambda: turns.pop(),
            lambda: turns.pop(0),
            lambda: turns[-1].update(reasoning_content=words(5)),
            lambda: turns[-1].update(extra=[[{}]], none=None, number=1.5),
            lambda: turns.append({"role": "tool", "content": words(4)}),
            lambda: turns[-1].update(content="<|im_end|><s>[INST]<｜end｜><end_of_turn>"),
            lambda: turns[0].update(content="\u00e9" * 300),
        ]
        for change in chance.choices([*changes, lambda: None], k=chance.randrange(3)):
            change()
        return {"messages": turns} if turns else {"messages": [{"role": "user", "content": "a"}]}

    def row() -> bytes:
        kind = chance.randrange(12)
        if kind == 0:
            return chance.choice(bad)(chance)
        if kind == 1:
            return json.dumps({"text": words(60)}).encode()
        if kind == 2:
            ids = [chance.randrange(500 if chance.random() < 0.1 else 300) for _ in range(chance.randrange(1, 60))]
            return json.dumps({"input_ids": ids, "loss_mask": [chance.randrange(2) for _ in ids]}).encode()
        if kind == 3:
            return json.dumps({"prompt": words(), "response": words(), "system": words(3)}).encode()
        if kind == 4:
            depth = chance.choice([90, 98, 99, 100, 101, 300])
            return json.dumps({**chat(), "more": 0}).replace('"more": 0', f'"more": {nested(depth)}').encode()
        if kind == 5:
            tool = {"type": "function", "function": {"name": words(2), "\udc00" if chance.random() < 0.3 else "a": 1}}
            return json.dumps({**chat(), "tools": json.dumps([tool])}).encode()
        if kind == 6:
            turns = [{"from": ("human", "gpt")[i % 2], "value": words()} for i in range(chance.randrange(1, 6))]
            return json.dumps({"conversations": turns}).encode()
        if kind == 7:
            arguments = f'{{"a": {nested(chance.choice([1, 97, 98, 99, 2000]))}}}'
            return one("assistant", words(), tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
        return json.dumps(chat()).encode()

    lines: list[bytes] = []
    while len(lines) < count:
        lines.append(chance.choice(lines) if lines and chance.random() < 0.1 else row())
    return lines


def write_hostile(path: Path, count: int, seed: int = 0) -> Path:
    lines = hostile_rows(count, seed)
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([lines[0], b"", *lines[1:]]))
    return path


def table_place(table: SampleTable, sample: int) -> tuple[int, int]:
    return int(table.row[sample]), int(table.answer[sample])


def compared(plan: Plan, config: ExtractConfig, files: TargetFiles) -> None:
    """Check everything that a plan says against the plain one."""
    plain = plain_plan(config, files)
    first_place = {token: one[:3] for one in reversed(plain.samples) for token in one[3]}
    beyond = next(((one[:3], token) for one in plain.samples for token in one[3] if token >= 400), None)
    plain.samples.sort(key=lambda one: -len(one[3]))  # one window holds them all
    table = plan.samples
    columns = (table.row, table.answer, table.num_anchors)
    found = [
        (table.source(i), *table_row[:2], *(part.tolist() for part in table.tokens.of(i)), table_row[2])
        for i, table_row in enumerate(zip(*(column.tolist() for column in columns), strict=True))
    ]
    assert found == plain.samples != []
    assert [(one.source, one.row, one.answer, one.reason, one.detail) for one in plan.rejects] == plain.rejects != []
    assert (plan.formats, plan.split, plan.num_truncated, plan.num_supervised_cut, plan.dropped) == (
        plain.formats,
        plain.split,
        plain.truncated,
        plain.supervised_cut,
        plain.dropped,
    )
    assert table.num_tokens.tolist() == [len(ids) for *_, ids, _, _ in plain.samples]
    assert table.num_supervised.tolist() == [sum(mask) for *_, mask, _ in plain.samples]
    known = {
        token: (table.source(sample), *table_place(table, sample))
        for token, sample in enumerate(plan.first_uses.tolist())
        if sample >= 0
    }
    assert known == {token: place for token, place in first_place.items() if token < len(plan.first_uses)}
    place = None if plan.beyond is None else (table.source(plan.beyond[0]), *table_place(table, plan.beyond[0]))
    assert beyond == (None if plan.beyond is None else (place, plan.beyond[1]))


def planned(config: ExtractConfig, files: TargetFiles, folder: Path, num_processes: int = 1) -> Plan:
    folder.mkdir()
    return make_plan(
        config, Data(config), ConversationEncoder(files, config), 64, folder, lambda _rows: None, num_processes
    )


def settings(tmp_path: Path, *data: Path, **more: Any) -> ExtractConfig:
    given = {"block_size": 4, "max_length": 120, "chunk_tokens": 16, "skip_bad_rows": True, **more}
    return ExtractConfig(data=data, target="t", out=tmp_path / "out", **given)


@pytest.mark.parametrize("mask", ["assistant", "last-turn", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_template_is_planned_as_plainly(tmp_path: Path, shape: str, mask: str) -> None:
    data = write_hostile(tmp_path / "a.jsonl", 80, seed=len(shape))
    config = settings(tmp_path, data, mask=mask, drop_duplicates=True, chat_template_kwargs={"enable_thinking": False})
    files = target(tmp_path / "target", shape)
    compared(planned(config, files, tmp_path / "plan"), config, files)


@pytest.mark.parametrize("change", ["NFC", "lowercase", "prefix space", "trimmed", "begin token", "no letters"])
@pytest.mark.parametrize("shape", ["tags", "none"])
def test_any_tokenizer_is_planned_as_plainly(tmp_path: Path, shape: str, change: str) -> None:
    data = write_hostile(tmp_path / "a.jsonl", 120, seed=len(change))
    config = settings(tmp_path, data, keep_special_tokens=True, max_length=4096)
    files = target(tmp_path / "target", shape, change)
    compared(planned(config, files, tmp_path / "plan"), config, files)


@pytest.mark.parametrize("shape", ["tags", "none"])
def test_blanks_within_an_answer_are_supervised_though_a_tokenizer_trims_places(tmp_path: Path, shape: str) -> None:
    files = target(tmp_path / "target", shape, "trimmed")
    encoder = ConversationEncoder(files, settings(tmp_path, tmp_path / "a.jsonl"))
    answer = "one \n\n  two"
    made = encoder.encode(Chat([{"role": "user", "content": "a b"}, {"role": "assistant", "content": answer}]))
    assert files.tokenizer.decode(made.input_ids[made.loss_mask]) == f"{answer}<|im_end|>"


def test_a_template_of_the_users_own_and_tools_for_all_rows_are_rendered_as_plainly(tmp_path: Path) -> None:
    template = SHAPES["none"][0] + "{{ tools | tojson if tools else '' }}{{ word }}"
    kwargs = {"chat_template": template, "tools": [{"name": "f"}], "word": "one"}
    config = settings(tmp_path, write_hostile(tmp_path / "a.jsonl", 80), mask="all", chat_template_kwargs=kwargs)
    files = target(tmp_path / "target", "none")
    plan = planned(config, files, tmp_path / "plan")
    compared(plan, config, files)


@pytest.mark.parametrize(("own", "given"), [("none", "tags"), ("tags", "none"), ("qwen3", "words")])
@pytest.mark.parametrize("mask", ["assistant", "last-turn"])
def test_tags_of_a_given_template_are_followed_as_plainly(tmp_path: Path, own: str, given: str, mask: str) -> None:
    kwargs = {"chat_template": SHAPES[given][0]}
    data = write_hostile(tmp_path / "a.jsonl", 60)
    config = settings(tmp_path, data, mask=mask, chat_template_kwargs=kwargs)
    files = target(tmp_path / "target", own)
    compared(planned(config, files, tmp_path / "plan"), config, files)


def slowed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have this process take its time over a batch, so that others get some; returns the sizes of its own."""
    own: list[int] = []
    work = RowTokenizer.__call__

    def slow(self: RowTokenizer, batch: Any) -> Any:
        own.append(len(batch))
        time.sleep(0.2)
        return work(self, batch)

    monkeypatch.setattr(RowTokenizer, "__call__", slow)
    monkeypatch.setattr(tokenize, "ALONE_BYTES", 1)
    monkeypatch.setattr(tokenize, "BATCH_BYTES", 4000)
    return own


def test_processes_make_the_same_plan_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = target(tmp_path / "target", "none")
    data = [write_hostile(tmp_path / f"{name}.jsonl", 500, seed) for seed, name in enumerate("ab")]
    rows = [json.loads(json.dumps(row)) for row in conversations(40)]
    arrow = write_arrow(tmp_path / "c.arrow", rows, stream=True)
    config = settings(
        tmp_path, Path(f"{data[0]}:0.9"), data[1], arrow, limit=900, drop_duplicates=True, mask="assistant"
    )
    alone = planned(config, files, tmp_path / "alone")
    compared(alone, config, files)
    own = slowed(monkeypatch)
    together = planned(config, files, tmp_path / "together", num_processes=3)
    assert 0 < sum(own) < 900  # others had a part in it
    assert together.counts() == alone.counts() and together.num_shards == alone.num_shards
    for name in ("samples.parquet", "rejects.parquet"):
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == ["rejects.parquet", "samples.parquet"]


def tokenizes(pid: int) -> bool:
    """Say whether a process is one that tokenizes, not the one that reads Parquet and Arrow files."""
    return b".tokenize " in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_process_that_is_killed_is_named_and_the_others_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = target(tmp_path / "target", "none")
    config = settings(tmp_path, write_hostile(tmp_path / "a.jsonl", 200))
    slowed(monkeypatch)
    rows = list(Data(config).raw_rows())[:50]
    worker = RowTokenizer(config, ConversationEncoder(files, config), None)
    started: list[int] = []
    with (
        pytest.raises(DflashError, match=r"was killed by SIGKILL\. If the machine ran out of memory"),
        closing(tokenize_rows(cycle(rows), worker, 2)) as endless,
    ):
        for count, _ in enumerate(endless):
            if count == 5:
                started = [child for child in children(os.getpid()) if tokenizes(child)]
                os.kill(started[0], signal.SIGKILL)
    assert len(started) == 2 and not any(map(is_running, started))


def test_a_fault_of_our_own_in_a_process_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = target(tmp_path / "target", "none")
    config = settings(tmp_path, write_hostile(tmp_path / "a.jsonl", 200))
    slowed(monkeypatch)
    worker = RowTokenizer(config, ConversationEncoder(files, config), "no such format")
    whole = RowTokenizer(config, worker.encoder, None)
    monkeypatch.setattr(RowTokenizer, "__call__", lambda _self, _batch: whole)  # here all goes well
    rows = list(Data(config).raw_rows())[:3]
    with pytest.raises(RuntimeError, match=r"Traceback(.|\n)*KeyError: 'no such format'"):
        for _ in tokenize_rows(cycle(rows), worker, 2):
            time.sleep(0.01)


_ENDLESS = """
import sys
from itertools import cycle
from pathlib import Path
sys.path[:] = {path!r}
from test_planning import *
folder = Path({folder!r})
config = settings(folder, write_hostile(folder / "a.jsonl", 200))
worker = RowTokenizer(config, ConversationEncoder(target(folder / "target", "none"), config), None)
tokenize.ALONE_BYTES, tokenize.BATCH_ROWS = 1, 20
rows = list(Data(config).raw_rows())[:20]
for count, _ in enumerate(tokenize_rows(cycle(rows), worker, 2)):
    if count == 200:
        print(*children(os.getpid()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path, end: signal.Signals) -> None:
    script = _ENDLESS.format(path=sys.path, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = [int(pid) for pid in process.stdout.readline().split()]
        assert len(started) == 2
        process.send_signal(end)
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_batch_is_full_by_bytes_or_rows_and_no_row_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "BATCH_BYTES", 500)
    monkeypatch.setattr(tokenize, "BATCH_ROWS", 3)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a" * length}) + "\n" for length in [1, 1, 1, 1, 600, 300, 300, 1]))
    found = list(batches(Data(settings(tmp_path, path)).raw_rows()))
    assert [len(batch) for batch in found] == [3, 1, 1, 1, 2]
    assert [row.line for batch in found for row in batch] == list(range(1, 9))
    assert all(is_json for batch in found for _, _, is_json in unparsed(batch))


def test_a_tokenizer_that_encodes_its_own_way_is_asked_itself(tmp_path: Path) -> None:
    files = target(tmp_path / "target", "none")
    usual = type(files.tokenizer)

    class Own(usual):  # type: ignore[valid-type, misc]
        def _encode_plus(self, text: Any, *arguments: Any, **more: Any) -> Any:
            return super()._encode_plus(text.upper(), *arguments, **more)

    files.tokenizer.__class__ = Own
    config = settings(tmp_path, write_hostile(tmp_path / "a.jsonl", 60), keep_special_tokens=True)
    encoder = ConversationEncoder(files, config)
    assert not encoder.tokenizer.portable
    compared(planned(config, files, tmp_path / "plan", num_processes=2), config, files)
    files.tokenizer.__class__ = usual
    assert ConversationEncoder(files, config).tokenizer.portable


@pytest.mark.parametrize(("drop_duplicates", "most"), [(False, 160), pytest.param(True, 256, marks=pytest.mark.slow)])
def test_memory_grows_by_numbers_and_hashes_alone(tmp_path: Path, drop_duplicates: bool, most: int) -> None:
    """A plan of more rows takes at most so many bytes more for each."""
    files, peaks = target(tmp_path / "target", "none"), []
    for count in (4_000, 10_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": f"the cat sees {i}"}) + "\n" for i in range(count)))
        tracemalloc.start()
        plan = planned(settings(tmp_path, path, drop_duplicates=drop_duplicates), files, tmp_path / f"{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(plan.samples) == count
    assert peaks[1] - peaks[0] < most * 6_000
