"""`dflash regenerate`: its options, and what they start."""

from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.arguments import (
    Attention,
    Device,
    DeviceMap,
    InputFormat,
    Json,
    Limit,
    LogFormatOption,
    Quiet,
    Revision,
    SkipBadRows,
    TargetDtype,
    TemplateKwargs,
    TrustRemoteCode,
    json_object,
    settings,
)
from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.settings.regenerate import RegenerateConfig


def regenerate(
    data: Annotated[list[Path], typer.Argument(help="Conversations, named as for `dflash extract`.")],
    out: Annotated[Path, typer.Option(help="JSONL file of the conversations with the target's own answers.")],
    target: Annotated[
        str | None, typer.Option(help="Hugging Face model: a folder, or a hub id. With --server only a name.")
    ] = RegenerateConfig.target,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="OpenAI-compatible server that answers; may be given several times."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name on the servers. [default: the target]")] = None,
    temperature: Annotated[
        float, typer.Option(help="0 for the likeliest token each time; above, tokens are drawn.")
    ] = RegenerateConfig.temperature,
    top_p: Annotated[
        float, typer.Option(help="When drawn: the likeliest tokens with this much together.")
    ] = RegenerateConfig.top_p,
    seed: Annotated[int, typer.Option(help="Of the draws, a row's own by its number.")] = RegenerateConfig.seed,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer; a longer one leaves its row out.")
    ] = RegenerateConfig.max_new_tokens,
    chat_template_kwargs: TemplateKwargs = "{}",
    input_format: InputFormat = RegenerateConfig.input_format,
    limit: Limit = RegenerateConfig.limit,
    skip_bad_rows: SkipBadRows = RegenerateConfig.skip_bad_rows,
    dtype: TargetDtype = RegenerateConfig.dtype,
    attn_implementation: Attention = RegenerateConfig.attn_implementation,
    device: Device = RegenerateConfig.device,
    device_map: DeviceMap = RegenerateConfig.device_map,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_rows: Annotated[
        int, typer.Option(help="Conversations answered at once here; another number may decide a near tie otherwise.")
    ] = RegenerateConfig.batch_rows,
    concurrency: Annotated[
        int, typer.Option(help="Requests on their way to all servers together.")
    ] = RegenerateConfig.concurrency,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds until a server's answer must be there.")
    ] = RegenerateConfig.timeout_s,
    row_tries: Annotated[
        int, typer.Option(help="Tries until a row is left out that fails while others are answered.")
    ] = RegenerateConfig.row_tries,
    backoff_s: Annotated[
        float, typer.Option(help="Seconds before a second try; doubled each time, or as the server asks.")
    ] = RegenerateConfig.backoff_s,
    server_tries: Annotated[
        int, typer.Option(help="Tries in a row without an answer until a server rests.")
    ] = RegenerateConfig.server_tries,
    rest_s: Annotated[
        float, typer.Option(help="Seconds of its first rest; the next ones are longer.")
    ] = RegenerateConfig.rest_s,
    rests: Annotated[
        int, typer.Option(help="Rests in a row until a server is gone; without one left the command stops.")
    ] = RegenerateConfig.rests,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Replace the assistant's turns of conversations by the target's own answers."""
    given = locals()
    with reported(
        "The answers so far are kept; repeat the command to go on.", quiet=quiet, log_format=log_format
    ) as progress:
        config = settings(
            RegenerateConfig,
            given,
            data=tuple(data),
            servers=tuple(server or ()),
            chat_template_kwargs=json_object(chat_template_kwargs, "--chat-template-kwargs"),
        )
        from dflash_offline.pipeline.regenerate import print_done
        from dflash_offline.stages.regenerate import regenerate as run

        print_done(run(config, progress), target, as_json=json_)
