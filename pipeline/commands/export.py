"""`dflash export`: its options, and what they start."""

import json
from pathlib import Path
from typing import Annotated

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import Json, LogFormatOption, Quiet, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.draft.formats import FORMATS
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.run import RUN
from dflash_offline.schemas.settings.option import ARGUMENTS, Option, choice_problem
from dflash_offline.stages.progress import readable_bytes

CHECKPOINTS = ("best", "last")


@command(
    "export",
    "Write a checkpoint as serving clients load it.",
    ("for z-lab's client, vLLM and SGLang", "run --out draft"),
    ("the newest checkpoint, for another client", "run --out draft --checkpoint last --format speculators"),
    ("a draft in another format", "draft --out other --format speculators --target Qwen/Qwen3-8B"),
)
def export(
    run: Annotated[Path, Option("Run folder made by `dflash train`, or a draft folder.", ARGUMENTS, "free", "RUN")],
    out: Annotated[Path, Option("Draft folder to write.", "Draft", "free", "FOLDER")],
    checkpoint: Annotated[
        str,
        Option(
            "Checkpoint to write: best (by the serving walk) or last.", "Draft", "free", "NAME", choices=CHECKPOINTS
        ),
    ] = "best",
    format_: Annotated[
        str,
        Option(
            "Format: zlab, for z-lab's client, vLLM and SGLang; speculators; or transformers, for its own generator.",
            "Draft",
            "free",
            "NAME",
            choices=FORMATS,
        ),
    ] = FORMATS[0],
    eval_: Annotated[
        Path | None,
        Option("Result of `dflash eval --save` for the model card.", "Draft", "free", "FILE", unset="RUN/eval.json"),
    ] = None,
    target: Annotated[
        str | None,
        Option("Target of a draft folder: a folder, or a hub id.", "Draft", "free", "MODEL", unset="a run's own"),
    ] = None,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint, or a draft in another format, as serving clients load it, checked by their rules."""
    with reported("Repeat the command.", quiet=quiet, log_format=log_format):
        if problem := choice_problem("--checkpoint", checkpoint, CHECKPOINTS):
            raise DflashError(problem)
        from dflash_offline.schemas.draft.lint import is_draft
        from dflash_offline.stages.export import export as write
        from dflash_offline.stages.export import export_draft

        is_run = (run / RUN).is_file() or not is_draft(run)
        if is_run and target is not None:
            raise DflashError("A run knows its target: leave --target out, or name a draft folder.")
        if not is_run and (eval_ is not None or checkpoint != CHECKPOINTS[0]):
            raise DflashError(f"{run} is a draft: --checkpoint and --eval are of a run. Leave them out.")
        done = write(run, out, checkpoint, format_, eval_) if is_run else export_draft(run, out, format_, target)
        if json_:
            written = {"draft": str(done.draft), "step": done.step}
            print(json.dumps({**written, "parameters": done.num_parameters, "bytes": done.num_bytes}, indent=1))
            return
        size = f"{done.num_parameters:,} parameters, {readable_bytes(done.num_bytes)}"
        print(f"{out} holds the draft{'' if done.step is None else f' of step {done.step}'}: {size}.")
        print(done.next_line(out))
