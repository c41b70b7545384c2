"""`dflash inspect`: its options, and the view that they choose."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dflash_offline.pipeline.arguments import (
    Html,
    InputFormat,
    Json,
    KeepSpecialTokens,
    Mask,
    NoReasoning,
    Revision,
    TemplateKwargs,
    TrustRemoteCode,
    check_file,
    json_object,
    settings,
)
from dflash_offline.pipeline.command import reported
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.extract import ExtractConfig


def inspect(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="CACHE|RUN...",
            help="Cache folder; or run folders, compared where there are several; or with --target, data that "
            "`dflash extract` would take.",
        ),
    ],
    sample: Annotated[
        int | None, typer.Option(help="Show this sample: its text with mask and anchors, its norms along the tokens.")
    ] = None,
    shard: Annotated[int | None, typer.Option(help="Show this shard: its record, bytes, statistics, samples.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show each layer's statistics and bytes.")] = False,
    features: Annotated[
        int | None,
        typer.Option(help="With --layers, read the features of so many samples: norms, outlier channels, similarity."),
    ] = None,
    top: Annotated[
        str | None,
        typer.Option(
            help="Show the longest or shortest samples, or the rare ones: those of the tokens that are rarest here.",
            metavar="longest|shortest|rare",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Show what extracting for this target would make of row --sample of the data.")
    ] = None,
    input_format: InputFormat = ExtractConfig.input_format,
    mask: Mask = ExtractConfig.mask,
    no_reasoning: NoReasoning = ExtractConfig.no_reasoning,
    keep_special_tokens: KeepSpecialTokens = ExtractConfig.keep_special_tokens,
    chat_template_kwargs: TemplateKwargs = "{}",
    block_size: Annotated[int, typer.Option(help="Of the data's row, as for `dflash extract`.")] = (
        ExtractConfig.block_size
    ),
    max_length: Annotated[int, typer.Option(help="Of the data's row, as for `dflash extract`.")] = (
        ExtractConfig.max_length
    ),
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    html: Html = None,
    json_: Json = False,
) -> None:
    """Show what a cache or a run holds and what looks wrong in it; or a row of data, before anything is extracted.

    No feature is read but with --sample, --features and --html.
    """
    given = locals()
    with reported():
        from dflash_offline.pipeline.inspect.run import is_run

        if html is not None:
            check_file(html, "--html")
        views = {"--sample": sample, "--shard": shard, "--layers": layers or None, "--features": features, "--top": top}
        named = [name for name, value in views.items() if value is not None]
        if html is not None and (target is not None or named):
            raise DflashError(f"--html is a page of a whole cache or run; leave {', '.join(named) or '--target'} out.")
        if target is not None:
            _show_row(folders, named, given, json_)
        elif is_run(folders[0]):
            _show_runs(folders, named, html, json_)
        else:
            _show_cache(folders, given, html, json_)


def _show_row(data: list[Path], named: list[str], given: dict[str, Any], as_json: bool) -> None:
    if of_caches := [name for name in named if name != "--sample"]:
        raise DflashError(f"With --target a row of data is shown; {', '.join(of_caches)} shows a part of a cache.")
    if len(data) > 1:
        raise DflashError("Of several data a row is not shown. Name one.")
    from dflash_offline.pipeline.inspect.row import print_row, row_view
    from dflash_offline.pipeline.terminal import print_json
    from dflash_offline.stages.target.model import quiet_libraries

    quiet_libraries()
    kwargs = json_object(given["chat_template_kwargs"], "--chat-template-kwargs")
    given = {name: value for name, value in given.items() if name not in ("layers", "features")}
    config = settings(ExtractConfig, given, data=(data[0],), out=data[0], chat_template_kwargs=kwargs)
    row = row_view(config, given["sample"] or 0)
    print_json(row) if as_json else print_row(row)


def _show_runs(runs: list[Path], named: list[str], html: Path | None, as_json: bool) -> None:
    if named:
        raise DflashError(f"{runs[0]} is a run, and {', '.join(named)} shows a part of a cache. Name one.")
    from dflash_offline.pipeline.inspect import run as run_view
    from dflash_offline.pipeline.inspect import run_report

    views = [run_view.run_view(run) for run in runs]
    if html is not None:
        from dflash_offline.pipeline.pages.run_page import write_run_page

        write_run_page(views, html)
    if as_json:
        print(json.dumps(views[0] if len(views) == 1 else run_view.compared(views), indent=1))
    elif html is not None:
        print(f"{html} shows {len(views)} run{'s' if len(views) > 1 else ''}. Next: open it in a browser.")
    elif len(views) == 1:
        run_report.print_run(views[0])
    else:
        run_report.print_runs(views)


def _show_cache(caches: list[Path], given: dict[str, Any], html: Path | None, as_json: bool) -> None:
    from dflash_offline.schemas.draft.lint import is_draft
    from dflash_offline.schemas.manifest import MANIFEST

    if len(caches) > 1:
        raise DflashError("Several folders are compared only where all are runs. Name one cache.")
    if caches[0].is_file():
        raise DflashError(f"{caches[0]} is a file. To see a row of data as it would be extracted, name a --target.")
    if not (caches[0] / MANIFEST).exists() and is_draft(caches[0]):
        raise DflashError(f"{caches[0]} is a model. Of a draft, `dflash verify` and `dflash eval` say more.")
    if html is not None:
        from dflash_offline.pipeline.pages.cache_page import write_cache_page

        done = write_cache_page(caches[0], html)
        if not as_json:
            print(f"{html} lists {done['listed']:,} samples and shows {done['shown']} of them token by token.")
            print("Next: open it in a browser.")
            return
    from dflash_offline.pipeline.inspect.cache import show_cache

    views = {name: given[name] for name in ("sample", "shard", "layers", "features", "top")}
    show_cache(caches[0], **views, as_json=as_json)
