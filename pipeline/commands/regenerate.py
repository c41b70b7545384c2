"""`dflash regenerate`: its options, what they start, and what it prints."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import Json, LogFormatOption, Quiet, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.settings.regenerate import RegenerateConfig

if TYPE_CHECKING:  # help is shown, and words are completed, without what takes long to import
    from dflash_offline.stages.regenerate import Regenerated


@command(
    "regenerate",
    "Replace a corpus's answers by the target's own.",
    ("answered here; repeated, it goes on", "chats.jsonl --target Qwen/Qwen3-8B --out own.jsonl"),
    (
        "answered by a server that runs the model",
        "chats.jsonl --target Qwen/Qwen3-8B --server http://127.0.0.1:8000/v1 --out own.jsonl",
    ),
    (
        "by vLLM in this process, over two GPUs",
        "chats.jsonl --target Qwen/Qwen3-32B --out own.jsonl --engine vllm --tensor-parallel-size 2",
    ),
)
def regenerate(
    settings: Callable[..., RegenerateConfig],
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Replace the assistant's turns of conversations by the target's own answers."""
    go_on = "The answers so far are kept; repeat the command to go on."
    with reported(go_on, quiet=quiet, log_format=log_format) as progress:
        config = settings()
        from dflash_offline.stages import regenerate as stage

        print_done(stage.regenerate(config, progress), config.target, as_json=json_)


def print_done(done: "Regenerated", target: str | None, *, as_json: bool) -> None:
    """Print what the new file holds and what to do next."""
    if as_json:
        rejects = str(done.rejects) if done.left_out else None
        print(json.dumps({**asdict(done), "out": str(done.out), "rejects": rejects}, indent=1))
        return
    from dflash_offline.stages.answers.advice import left_out

    now = f"{done.num_answers_now:,} got now, {done.seconds:.0f} s"
    print(f"{done.out} is complete: {done.num_rows:,} conversations, {done.num_answers:,} answers ({now}).")
    for what, count in done.notes.items():
        print(f"  {count:,} {what}")
    for line in left_out(done.left_out):
        print(f"  left out: {line}")
    if done.left_out:
        print(f"  each is named in {done.rejects}")
    print(f"Next: {dflash_line('extract', done.out, '--target', target or 'MODEL', '--out', 'CACHE')}")
