"""`dflash eval`: its options, and what they start."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.arguments import (
    Attention,
    Device,
    Json,
    LogFormatOption,
    Quiet,
    Revision,
    TemplateKwargs,
    TrustRemoteCode,
    check_file,
    json_object,
    one_of,
    settings,
)
from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.files import write_output
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.shared import DTYPES


def evaluate(
    draft: Annotated[
        Path, typer.Argument(help="Draft folder, ours or another's; or a run folder, for its best checkpoint.")
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Hugging Face model: a folder, or a hub id. [default: none; a cache is walked without it]"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL of {"messages": [...]} or {"prompt": "..."}, and "kind" if wanted.')
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Cache; its held-out samples are the prompts, or walked.")] = None,
    limit: Annotated[int | None, typer.Option(help="Or held-out samples, from the first. [default: all]")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of one answer, at most.")] = EvalConfig.max_new_tokens,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; above, tokens are drawn, and drafted ones kept by rejection sampling.")
    ] = EvalConfig.temperature,
    top_p: Annotated[
        float, typer.Option(help="When drawn: the likeliest tokens that together have this much.")
    ] = EvalConfig.top_p,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = EvalConfig.seed,
    repeats: Annotated[
        int, typer.Option(help="Each prompt is decoded each way, in turn; speeds are of the medians.")
    ] = EvalConfig.repeats,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Also decode with prompt lookup, for comparison.")
    ] = EvalConfig.prompt_lookup,
    chat_template_kwargs: TemplateKwargs = "{}",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16 or float16; auto is float32 on the CPU, else the target's.",
            autocompletion=one_of(*DTYPES),
        ),
    ] = EvalConfig.dtype,
    attn_implementation: Attention = EvalConfig.attn_implementation,
    device: Device = EvalConfig.device,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: one a core]")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write a page of where the draft fails: every round of every prompt, by token."
        ),
    ] = None,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Decode prompts with and without the draft, or walk a cache; exit 1 if an answer changes."""
    given = locals()
    with reported("Repeat the command.", quiet=quiet, log_format=log_format) as progress:
        for flag, path in (("--save", save), ("--html", html)):
            if path is not None:
                check_file(path, flag)
        kwargs = json_object(chat_template_kwargs, "--chat-template-kwargs")
        config = settings(
            EvalConfig, given, chat_template_kwargs=kwargs, keep_rounds=html is not None and target is not None
        )
        from dflash_offline.pipeline import eval_report as report
        from dflash_offline.pipeline.pages import eval_page, plots
        from dflash_offline.stages.evaluate import evaluate_folder, token_decoder
        from dflash_offline.stages.target.model import quiet_libraries

        quiet_libraries()
        if html is not None:
            plots.require_matplotlib()
        result = evaluate_folder(config, progress)
        text = json.dumps(result.to_json(), indent=1)
        print(text) if json_ else report.print_report(result)
        if save is not None:
            write_output(save, f"{text}\n".encode())
        if html is not None:
            eval_page.write_eval_page(result, html, token_decoder(config) if config.target else None)
            if not json_:
                print(f"{html} shows every round. Next: open it in a browser.")
        if not json_:
            report.print_next(save, result)
        if result.lossless is False:
            raise typer.Exit(1)
