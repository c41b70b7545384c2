"""How the commands' help reads: options in groups, every number with its unit, examples that run as printed."""

import inspect
import textwrap
from typing import Any

import typer.core

UNITS = {
    **dict.fromkeys("block_size max_length batch_tokens chunk_tokens row_tokens max_new_tokens".split(), "TOKENS"),
    **dict.fromkeys("draft_max_position_embeddings sliding_window".split(), "POSITIONS"),
    **dict.fromkeys("steps val_every save_every".split(), "STEPS"),
    **dict.fromkeys("samples batch_size val_samples".split(), "SAMPLES"),
    **dict.fromkeys("num_layers draft_layers".split(), "LAYERS"),
    **dict.fromkeys("draft_heads draft_kv_heads".split(), "HEADS"),
    **dict.fromkeys("draft_head_dim draft_intermediate_size".split(), "CHANNELS"),
    **dict.fromkeys("loader_threads threads".split(), "THREADS"),
    **dict.fromkeys("warmup_ratio top_p max_skipped".split(), "SHARE"),
    **dict.fromkeys("learning_rate weight_decay".split(), "RATE"),
    **{"sample": "INDEX", "limit": "ROWS", "eval limit": "PROMPTS", "mask_token_id": "ID", "seed": "SEED"},
    **{"shard_mib": "MIB", "mantissa_bits": "BITS", "step": "DEVIATIONS"},
    **dict.fromkeys("timeout_s backoff_s rest_s plan_timeout_s".split(), "SECONDS"),
    **{
        "batch_rows": "ROWS",
        "concurrency": "REQUESTS",
        "row_tries": "TRIES",
        "server_tries": "TRIES",
        "rests": "TIMES",
    },
    **{"features": "SAMPLES", "shard": "INDEX"},
    **{"workers": "PROCESSES", "rank": "RANK", "world_size": "COMMANDS"},
    **{"epochs": "PASSES", "accumulation": "BATCHES", "ema": "DECAY", "clip": "NORM"},
    **{"num_anchors": "BLOCKS", "gamma": "SLOTS", "draft_rope_theta": "BASE", "draft_rms_norm_eps": "EPSILON"},
    **{"patience": "VALIDATIONS", "keep": "CHECKPOINTS", "temperature": "T", "repeats": "TIMES"},
}
"""What an option counts, by its name, or by its command's and its own."""

_OUTPUT = "json_ log_format quiet help"
GROUPS: dict[str, dict[str, str]] = {
    "regenerate": {
        "Data": "out input_format limit skip_bad_rows",
        "Target": "target revision trust_remote_code dtype attn_implementation device device_map batch_rows",
        "Answers": "max_new_tokens temperature top_p seed chat_template_kwargs",
        "Servers": "server model concurrency timeout_s row_tries backoff_s server_tries rest_s rests",
        "Output": _OUTPUT,
    },
    "extract": {
        "Cache": "out plan ignore_free_space",
        "Data": "input_format limit seed drop_duplicates skip_bad_rows max_length chat_template_kwargs",
        "Loss mask": "mask no_reasoning keep_special_tokens",
        "Target": "target revision trust_remote_code dtype attn_implementation device device_map batch_tokens",
        "What is captured": "layers num_layers block_size mask_token_id on_bad_features max_skipped",
        "How it is stored": "features mantissa_bits step shard_mib chunk_tokens",
        "Several processes": "workers rank world_size plan_timeout_s",
        "Output": _OUTPUT,
    },
    "verify": {
        "Checks": "repair",
        "Target": "target samples seed revision trust_remote_code attn_implementation device device_map",
        "Output": _OUTPUT,
    },
    "train": {
        "Run": "out config init_from dry_run",
        "Data": "weights epochs steps packing batch_tokens row_tokens batch_size accumulation seed loader_threads",
        "Optimizer": "optimizer learning_rate warmup_ratio weight_decay clip ema",
        "Loss": "loss gamma num_anchors block_size",
        "Draft": "layers draft_layers draft_heads draft_kv_heads draft_head_dim draft_intermediate_size "
        "draft_rope_theta draft_rms_norm_eps draft_max_position_embeddings sliding_window sliding_layers causal_layers",
        "Validation and checkpoints": "val_samples val_every patience save_every keep report_to",
        "Device": "device dtype attention_backend compile gradient_checkpointing",
        "Output": _OUTPUT,
    },
    "export": {"Draft": "out checkpoint format_ eval_", "Output": _OUTPUT},
    "eval": {
        "What is decoded": "target prompts cache limit chat_template_kwargs revision trust_remote_code",
        "How it is decoded": "max_new_tokens temperature top_p seed repeats prompt_lookup",
        "Device": "device dtype attn_implementation threads",
        "Output": f"save plot html {_OUTPUT}",
    },
    "demo": {"Output": "out log_format quiet help"},
    "doctor": {"What is looked at": "out target", "Output": _OUTPUT},
}
"""The options of a command under headings; one that stands nowhere comes last, under `Options`."""

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "regenerate": (
        ("answered here; repeated, it goes on", "chats.jsonl --target Qwen/Qwen3-8B --out own.jsonl"),
        (
            "answered by a server that runs the model",
            "chats.jsonl --target Qwen/Qwen3-8B --server http://127.0.0.1:8000/v1 --out own.jsonl",
        ),
    ),
    "extract": (
        ("what it would make and take, before any work", "chats.jsonl --target Qwen/Qwen3-8B --out cache --plan"),
        ("the same without --plan; repeated, it goes on", "chats.jsonl --target Qwen/Qwen3-8B --out cache"),
        (
            "three tenths of a file and all of another, mixed",
            "a.jsonl:0.3 b.jsonl --target Qwen/Qwen3-8B --out mixed",
        ),
    ),
    "inspect": (
        ("what is in it, at any time", "cache"),
        ("one sample's text, its supervised part marked", "cache --sample 0"),
        ("each layer, with the features of eight samples", "cache --layers --features 8"),
        ("a page for the browser", "cache --html cache.html"),
        ("two runs side by side, in the terminal", "run other"),
        ("a row as it would be extracted, or why not", "chats.jsonl --target Qwen/Qwen3-8B --sample 3"),
    ),
    "verify": (
        ("every checksum, and some samples run again", "cache --target Qwen/Qwen3-8B"),
        ("forget what is faulty; repeat the extraction then", "cache --repair"),
        ("a draft, by every client's rules", "draft"),
    ),
    "train": (
        ("parameters, memory, steps and time; writes nothing", "cache --out run --dry-run"),
        ("all by default; repeated, it goes on", "cache --out run"),
        ("two caches, of one three tenths an epoch", "cache more --weights 1,0.3 --out run"),
        ("the settings of another run, one of them changed", "--config run/config.toml --out again --lr 3e-4"),
    ),
    "export": (
        ("for z-lab's client, vLLM and SGLang", "run --out draft"),
        (
            "the newest checkpoint, for another client",
            "run --out draft --checkpoint last --format speculators",
        ),
    ),
    "eval": (
        ("speed and losslessness too", "draft --target Qwen/Qwen3-8B --prompts held_out.jsonl"),
        ("acceptance length alone; no target is loaded", "run --cache cache"),
        (
            "tokens drawn at a temperature",
            "run --target Qwen/Qwen3-8B --cache cache --temperature 0.7",
        ),
    ),
    "demo": (("six minutes on two cores", "--out demo"),),
    "doctor": (
        ("packages, devices, attention, this disk", ""),
        ("another disk and a target", "--out /data --target Qwen/Qwen3-8B"),
        ("for a bug report", "--json > here.json"),
    ),
}
"""A remark and the arguments of each example."""

_SUMMARIES = {
    "regenerate": "Replace a corpus's answers by the target's own.",
    "extract": "Run a target over conversations once, into a cache.",
    "inspect": "Show what a cache, a run or a row of data holds.",
    "verify": "Check a cache, or a draft; exit 1 if it is wrong.",
    "train": "Train a draft from caches, without the target.",
    "export": "Write a checkpoint as serving clients load it.",
    "eval": "Measure a draft: acceptance length, speed, losslessness.",
    "demo": "Run all of it on a small target that ships here.",
    "doctor": "Look at this machine, and say what is wrong.",
}
OVERVIEW = """\b
The way through:
  dflash doctor
  dflash regenerate chats.jsonl --target Qwen/Qwen3-8B --out own.jsonl
  dflash extract own.jsonl --target Qwen/Qwen3-8B --out cache
  dflash inspect cache
  dflash train cache --out run
  dflash export run --out draft
  dflash eval draft --target Qwen/Qwen3-8B --prompts held_out.jsonl

dflash COMMAND --help has examples. dflash --install-completion lets the shell complete commands, options and values."""


def taught(command: str) -> dict[str, Any]:
    """Return what `app.command` takes to make a command's help teach it."""
    lines = [f"  # {remark}\n  {_broken(f'dflash {command} {arguments}')}" for remark, arguments in EXAMPLES[command]]
    return {
        "name": command,
        "cls": _grouped(command),
        "short_help": _SUMMARIES[command],
        "epilog": "\b\nExamples:\n" + "\n".join(lines),
    }


def _broken(line: str) -> str:
    """Return a command as it may be pasted, on as many lines as 80 columns need."""
    return " \\\n    ".join(textwrap.wrap(line, 74, break_long_words=False, break_on_hyphens=False))


def _grouped(command: str) -> type[typer.core.TyperCommand]:
    """Return a command class that lists its options by group: typer knows groups in rich's boxes alone."""

    class Grouped(typer.core.TyperCommand):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            for param in self.params:
                unit = UNITS.get(f"{command} {param.name}") or UNITS.get(param.name or "")
                if unit and getattr(param, "metavar", None) is None:
                    param.metavar = unit

        def format_options(self, ctx: Any, formatter: Any) -> None:
            heading = {n: title for title, names in GROUPS.get(command, {}).items() for n in names.split()}
            sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
            sections |= {title: [] for title in GROUPS.get(command, {})}
            for param in self.get_params(ctx):
                record = param.get_help_record(ctx)
                title = "Arguments" if param.param_type_name == "argument" else heading.get(param.name or "", "Options")
                if record is not None:
                    sections.setdefault(title, []).append(record)
            for title, records in sections.items():
                if records:
                    with formatter.section(title):
                        formatter.write_dl(records)

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            """Write the examples as they stand; click would indent them and join their lines."""
            formatter.write_paragraph()
            formatter.write_text(inspect.cleandoc(self.epilog or ""))

    return Grouped
