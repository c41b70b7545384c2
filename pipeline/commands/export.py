"""`dflash export`: its options, and what they start."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.arguments import Json, LogFormatOption, Quiet, one_of
from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.draft.formats import FORMATS
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.shared import choice_problem
from dflash_offline.stages.progress import readable_bytes

CHECKPOINTS = ("best", "last")


def export(
    run: Annotated[Path, typer.Argument(help="Run folder made by `dflash train`.")],
    out: Annotated[Path, typer.Option(help="Draft folder to write.")],
    checkpoint: Annotated[
        str,
        typer.Option(help="best (by the serving walk) or last.", metavar="NAME", autocompletion=one_of(*CHECKPOINTS)),
    ] = "best",
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="zlab, for z-lab's client, vLLM and SGLang; or speculators; or transformers, for its own generator.",
            metavar="NAME",
            autocompletion=one_of(*FORMATS),
        ),
    ] = FORMATS[0],
    eval_: Annotated[
        Path | None,
        typer.Option("--eval", help="Result of `dflash eval --save` for the model card. [default: RUN/eval.json]"),
    ] = None,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint as a folder that the serving clients load, checked by their rules."""
    with reported("Repeat the command.", quiet=quiet, log_format=log_format):
        if problem := choice_problem("--checkpoint", checkpoint, CHECKPOINTS):
            raise DflashError(problem)
        from dflash_offline.stages.export import export as write

        done = write(run, out, checkpoint, format_, eval_)
        if json_:
            written = {"draft": str(done.draft), "step": done.step}
            print(json.dumps({**written, "parameters": done.num_parameters, "bytes": done.num_bytes}, indent=1))
            return
        size = f"{done.num_parameters:,} parameters, {readable_bytes(done.num_bytes)}"
        print(f"{out} holds the draft of step {done.step}: {size}.")
        print(done.next_line(out))
