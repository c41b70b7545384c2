"""`dflash inspect`: its options, and the view that they choose."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import Json, Part, check_file, command
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.option import ARGUMENTS, Option
from dflash_offline.schemas.settings.shared import TARGET

_ROW_SETTINGS = Part(
    "max_length chat_template_kwargs input_format mask no_reasoning keep_special_tokens revision trust_remote_code "
    "block_size",
    group="A row of data",
)
_PART = "A part of a cache"

# The formatter would give every word of an option a line of its own.
# fmt: off
Folders = Annotated[tuple[Path, ...], Option(
    "Cache folder; or run folders, compared where there are several; or with --target, data that `dflash extract` "
    "would take.", ARGUMENTS, "free", "CACHE|RUN")]
Sample = Annotated[int | None, Option(
    "Show this sample: its text with mask and anchors, its norms along the tokens.", _PART, "free", "INDEX")]
Shard = Annotated[int | None, Option(
    "Show this shard: its record, bytes, statistics, samples.", _PART, "free", "INDEX")]
Layers = Annotated[bool, Option("Show each layer's statistics and bytes.", _PART, "free")]
Features = Annotated[int | None, Option(
    "Samples whose features to read for --layers: norms, outlier channels, similarity.", _PART, "free", "SAMPLES")]
Top = Annotated[str | None, Option(
    "Show the longest or shortest samples, or the rare ones: those of the tokens that are rarest here.",
    _PART, "free", "NAME", completions=("longest", "shortest", "rare"))]
Target = Annotated[str | None, Option(
    "Show what extracting for this target would make of row --sample of the data.",
    _ROW_SETTINGS.group, "free", TARGET.unit)]
Html = Annotated[Path | None, Option(
    "Write a page that opens in a browser, without network.", "Output", "free", "FILE")]
# fmt: on


@command(
    "inspect",
    "Show what a cache, a run or a row of data holds.",
    ("what is in it, at any time", "cache"),
    ("one sample's text, its supervised part marked", "cache --sample 0"),
    ("each layer, with the features of eight samples", "cache --layers --features 8"),
    ("a page for the browser", "cache --html cache.html"),
    ("two runs side by side, in the terminal", "run other"),
    ("a row as it would be extracted, or why not", "chats.jsonl --target Qwen/Qwen3-8B --sample 3"),
)
def inspect(
    folders: Folders,
    sample: Sample = None,
    shard: Shard = None,
    layers: Layers = False,
    features: Features = None,
    top: Top = None,
    *,
    target: Target = None,
    settings: Annotated[Callable[..., ExtractConfig], _ROW_SETTINGS],
    html: Html = None,
    json_: Json = False,
) -> None:
    """Show what a cache or a run holds and what looks wrong in it; or a row of data, before anything is extracted.

    No feature is read but with --sample, --features and --html.
    """
    with reported():
        from dflash_offline.pipeline.inspect.run import is_run
        from dflash_offline.stages.buckets.mirror import worked_on

        if target is None:
            folders = tuple(worked_on(folder) for folder in folders)

        if html is not None:
            check_file(html, "--html")
        views = {"--sample": sample, "--shard": shard, "--layers": layers or None, "--features": features, "--top": top}
        named = [name for name, value in views.items() if value is not None]
        if html is not None and (target is not None or named):
            raise DflashError(f"--html is a page of a whole cache or run; leave {', '.join(named) or '--target'} out.")
        if target is not None:
            _show_row(folders, named, lambda data: settings(data=(data,), out=data, target=target), sample, json_)
        elif is_run(folders[0]):
            _show_runs(folders, named, html, json_)
        else:
            chosen = {"sample": sample, "shard": shard, "layers": layers, "features": features, "top": top}
            _show_cache(folders, chosen, html, json_)


def _show_row(
    data: Sequence[Path],
    named: list[str],
    settings: Callable[[Path], ExtractConfig],
    sample: int | None,
    as_json: bool,
) -> None:
    if of_caches := [name for name in named if name != "--sample"]:
        raise DflashError(f"With --target a row of data is shown; {', '.join(of_caches)} shows a part of a cache.")
    if len(data) > 1:
        raise DflashError("Of several data a row is not shown. Name one.")
    from dflash_offline.pipeline.inspect.row import print_row, row_view
    from dflash_offline.pipeline.terminal import print_json
    from dflash_offline.stages.target.model import quiet_libraries

    quiet_libraries()
    views = row_view(settings(data[0]), sample or 0)
    if as_json:
        print_json(views[0] if len(views) == 1 else views)
    else:
        print_row(views)


def _show_runs(runs: Sequence[Path], named: list[str], html: Path | None, as_json: bool) -> None:
    if named:
        raise DflashError(f"{runs[0]} is a run, and {', '.join(named)} shows a part of a cache. Name one.")
    from dflash_offline.pipeline.inspect.run import compare, read_run
    from dflash_offline.pipeline.inspect.run_report import print_run, print_runs
    from dflash_offline.pipeline.terminal import print_json

    views = [read_run(run) for run in runs]
    if html is not None:
        from dflash_offline.pipeline.pages.run_page import write_run_page

        write_run_page(views, html)
    if as_json:
        print_json(views[0] if len(views) == 1 else compare(views))
    elif html is not None:
        print(f"{html} shows {len(views)} run{'s' if len(views) > 1 else ''}. Next: open it in a browser.")
    elif len(views) == 1:
        print_run(views[0])
    else:
        print_runs(views)


def _show_cache(caches: Sequence[Path], views: dict[str, Any], html: Path | None, as_json: bool) -> None:
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

        listed, shown = write_cache_page(caches[0], html)
        if not as_json:
            print(f"{html} lists {listed:,} samples and shows {shown} of them token by token.")
            print("Next: open it in a browser.")
            return
    from dflash_offline.pipeline.inspect.cache import show_cache

    show_cache(caches[0], **views, as_json=as_json)
