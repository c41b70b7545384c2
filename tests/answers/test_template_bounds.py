"""Chat templates that would take all time or memory: stopped within seconds, named, wherever one is rendered."""

import json
import resource
import signal
from pathlib import Path

import pytest
from running import dflash, refused
from tiny_target import save_conversations, save_target, save_tokenizer
from transformers import AutoTokenizer, Qwen3Config

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages import bounds
from dflash_offline.stages.bounds import OutOfBoundsError
from dflash_offline.stages.conversations import tokenize
from dflash_offline.stages.conversations.content import Chat
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.prompts import Prompt, encode_prompt
from dflash_offline.stages.conversations.rendering import MOST_RENDERED
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.conversations.tokenize import RowTokenizer, tokenize_rows
from dflash_offline.stages.target.files import TargetFiles

TIME, MEMORY = "s of processor time", "of memory"
GROWING = "{% set ns = namespace(s='xy', l=[1]) %}{% for i in range(99) %}{% set ns.SET %}{% endfor %}{{ ns.s }}"
LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}"
)
FOLDED = "{{ 'x' * 10**10 }}"
HOSTILE = {
    "loops": (LOOP, TIME),
    "macro": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", TIME),
    "text of a filter": ("{{ lipsum(n=10**8) }}", TIME),
    "power": ("{% set n = messages | length + 7 %}{{ (n ** (n ** n)) ** n > 1 }}", TIME),
    "product, folded as it is compiled": (FOLDED, MEMORY),
    "product": ("{{ messages[0].role * 10**10 }}", MEMORY),
    "list": ("{{ (messages * 10**10) | length }}", MEMORY),
    "width": ("{{ '%10000000000d' % messages | length }}", MEMORY),
    "format": ("{{ '{:>10000000000}'.format(messages | length) }}", MEMORY),
    "filter": ("{{ messages[0].role | center(10**10) }}", MEMORY),
    "doubled": (GROWING.replace("SET", "s = ns.s ~ ns.s"), ""),
    "replaced": (GROWING.replace("SET", "s = ns.s.replace('x', 'xxxx')"), ""),
    "nested": (GROWING.replace("SET", "l = [ns.l, ns.l]") + "{{ ns.l | string }}", ""),
}
CHAT = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None)


def encoder(folder: Path, template: str, **changes: object) -> ConversationEncoder:
    save_tokenizer(folder, template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = TargetFiles(folder=folder, name="t", config=Qwen3Config(), tokenizer=tokenizer, template=template)
    return ConversationEncoder(files, ExtractConfig(data=(folder,), out=folder, target="t", **changes))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_SECONDS", 1)
    monkeypatch.setattr(bounds, "MOST_BYTES", 128 << 20)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_bounds_is_stopped_and_named(name: str, tmp_path: Path) -> None:
    template, exceeded = HOSTILE[name]
    limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    with pytest.raises(OutOfBoundsError) as caught:
        encoder(tmp_path, template).encode_all([CHAT])
    assert f"The chat template of {tmp_path} takes more than " in str(caught.value) and exceeded in str(caught.value)
    assert [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)] == limits
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_a_template_that_calls_itself_for_ever_is_an_error_of_the_row(tmp_path: Path) -> None:
    (((_, row),),) = encoder(tmp_path, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").encode_all([CHAT])
    assert isinstance(row, RecursionError)


def test_a_template_that_makes_too_much_text_of_a_row_loses_the_row(tmp_path: Path) -> None:
    (((_, row),),) = encoder(tmp_path, f"{{{{ 'x' * {MOST_RENDERED + 1} }}}}", mask="all").encode_all([CHAT])
    assert row.args[0] == "far too long" and "8,388,609 characters" in row.args[1]


def test_prompts_and_old_turns_are_rendered_within_the_same_bounds(tmp_path: Path) -> None:
    given = {"chat_template": FOLDED}
    save_target(tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    prompt = Prompt(place="p.jsonl:7", messages=CHAT.messages[:1])
    with pytest.raises(DflashError, match=r"^p\.jsonl:7: The chat template of --chat-template-kwargs takes more"):
        encode_prompt(prompt, tokenizer, given)
    long = {"chat_template": "{{ 'x' * 10**7 }}"}
    with pytest.raises(DflashError, match=r"p\.jsonl:7 becomes 10,000,000 characters"):
        encode_prompt(prompt, tokenizer, long)
    data = save_conversations(tmp_path / "a.jsonl", 3)
    refused(
        dflash(
            "regenerate", data, "--target", tmp_path / "target", "--out", tmp_path / "new.jsonl",
            "--chat-template-kwargs", json.dumps(given),
        ),
        "a.jsonl:1, turn 0: The chat template of --chat-template-kwargs takes more than 128.0 MiB of memory",
    )  # fmt: skip


def test_the_row_that_takes_too_long_is_named_in_this_process_and_in_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template is harmless but for one row."""
    work = encoder(tmp_path, "{% if 'bomb' in messages[0].content %}" + FOLDED + "{% endif %}", mask="all")
    chats = [{"messages": [{"role": "user", "content": "bomb" if i == 250 else "a"}]} for i in range(300)]
    rows = ["{", *map(json.dumps, chats)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    config = ExtractConfig(data=(tmp_path / "a.jsonl",), out=tmp_path, target="t", mask="all", skip_bad_rows=True)
    monkeypatch.setattr(tokenize, "BATCH_ROWS", 20)
    for alone in (1 << 30, 1):
        monkeypatch.setattr(tokenize, "ALONE_BYTES", alone)
        with pytest.raises(DflashError, match=r"a\.jsonl:252: The chat template of .* takes more than "):
            list(tokenize_rows(Data(config).raw_rows(), RowTokenizer(config, work, None), 2))
