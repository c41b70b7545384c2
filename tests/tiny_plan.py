"""A plan of the rows given, for a tiny target, in their order unless asked for otherwise."""

import json
import tempfile
from pathlib import Path
from typing import Any

from tiny_target import WITH_TAGS, save_tokenizer
from transformers import AutoTokenizer, Qwen3Config

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.plan import Plan, make_plan
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.target.files import TargetFiles


def target_files(folder: Path, template: str) -> TargetFiles:
    save_tokenizer(folder, template)
    return TargetFiles(
        folder=folder,
        name="tiny",
        config=Qwen3Config(vocab_size=304, eos_token_id=2),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        template=template,
    )


def plan(
    tmp_path: Path,
    rows: list[Any],
    template: str = WITH_TAGS,
    *,
    as_served: bool = True,
    by_length: bool = False,
    slot_bytes: int = 64,
    **settings: object,
) -> Plan:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    config = ExtractConfig(
        **{
            "data": (data,),
            "target": "tiny",
            "out": tmp_path / "cache",
            "block_size": 4,
            "chunk_tokens": 16,
            **settings,
        }
    )
    files = target_files(tmp_path / "target", template)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    encoder = ConversationEncoder(files, config, as_served=as_served)
    return make_plan(config, Data(config), encoder, slot_bytes, folder, lambda _rows: None, by_length=by_length)
