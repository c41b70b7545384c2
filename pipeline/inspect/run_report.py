"""What `dflash inspect RUN ...` prints: state, settings, what looks wrong and curves, as wide as the terminal."""

import textwrap
from collections.abc import Sequence
from typing import Any

from dflash_offline.pipeline.inspect.run import bucket_means, compare
from dflash_offline.pipeline.inspect.run_view import RunView
from dflash_offline.pipeline.safe_output import safe
from dflash_offline.pipeline.terminal import open_console, sparkline
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.results.expected import TEMPERATURES, expected_metric
from dflash_offline.schemas.variants.table import BASE, VARIANTS, own_fields
from dflash_offline.stages.progress import readable_seconds

_BESIDE_CURVE = 52
"""Columns of a curve's name and numbers; the curve has the rest of the line."""
CURVES = (
    ("training", "loss", "training loss"),
    ("validation", "val_loss", "held-out loss"),
    ("training", "accept_len_over_anchors", "acceptance, all anchors, training"),
    ("validation", "val_accept_len_over_anchors", "acceptance, all anchors, held-out"),
    ("validation", "val_serving_walk", "acceptance, serving walk, held-out"),
    *(
        ("validation", f"val_{expected_metric(one)}", f"expected acceptance at {one:g}, no target")
        for one in TEMPERATURES
    ),
    ("validation", "val_accuracy", "accuracy, held-out"),
    ("training", "learning_rate", "learning rate"),
    ("training", "grad_norm", "gradient norm"),
    ("training", "tokens_per_s", "tokens/s"),
    ("training", "data_wait_share", "waiting for data, share"),
    ("training", "peak_memory_gib", "peak memory, GiB"),
    *((curve.kind, curve.metric, curve.label) for kind in VARIANTS.values() for curve in kind.curves),
)
"""Which rows, which metric of them, and what it is; a variant's are shown of runs that have them."""
BY_SLOT = {
    "val_accuracy_by_slot": "Accuracy by slot",
    **{metric: title for kind in VARIANTS.values() for metric, title in kind.by_slot.items()},
}
"""Metrics of held-out samples with a value for each slot."""
SHOWN_SETTINGS = (
    "loss teacher_temperature gamma optimizer learning_rate warmup_ratio weight_decay clip ema packing batch_tokens "
    "batch_size num_anchors accumulation_times_ranks dtype seed val_samples val_every weights"
).split() + [name for kind in VARIANTS.values() for name in kind.loss_settings]


def curve(values: Sequence[float], low: float, high: float) -> str:
    """Return one sign a value, as high as the value lies between `low` and `high`."""
    return sparkline([(value - low) / (high - low) if high > low else 0.5 for value in values])


def print_run(view: RunView) -> None:
    """Print one run for a person."""
    width = open_console().width
    for name, text in _lines(view):
        # A path longer than a line stays whole, to be copied.
        wrapped = textwrap.wrap(safe(text), max(width - 12, 20), break_long_words=False, break_on_hyphens=False) or [""]
        for first, line in zip([name, *[""] * len(wrapped)], wrapped, strict=False):
            print(f"{first:<12}{line}")
    columns = max(width - _BESIDE_CURVE, 8)
    rows = {"training": view.training, "validation": view.validation}
    if view.training or view.validation:
        print(f"\n{'Curves, by step':<{columns + 36}} {'first':>7} {'last':>7}")
    for kind, name, label in CURVES:
        _, means = bucket_means(rows[kind], name, columns)
        if means:
            values = [row[name] for row in rows[kind] if row.get(name) is not None]
            signs = curve(means, min(means), max(means))
            print(f"{label:<35} {signs:<{columns}} {number(values[0]):>7} {number(values[-1]):>7}")
    last = view.last_validation or {}
    for metric, title in BY_SLOT.items():
        if metric in last:
            print(f"\n{title}, held-out, step {last['step']:,}")
            for slot, share in enumerate(last[metric], start=1):
                print(f"  {slot:>3}  {share or 0:>6.1%}  {'#' * round(50 * min(max(share or 0, 0), 1))}".rstrip())
    print(f"\nNext: {dflash_line('inspect', view.run, '--html', 'run.html')}")


def _lines(view: RunView) -> list[tuple[str, str]]:
    draft, steps = view.draft, ", ".join(f"{step:,}" for step in view.checkpoints) or "none yet"
    lines = [
        ("Run", view.run),
        ("State", progress_text(view)),
        ("Best", best_text(view)),
        *(("Looks wrong", line) for line in view.warnings),
        ("Checkpoints", f"steps {steps}" if view.checkpoints else steps),
        ("Target", view.target),
        (
            "Draft",
            f"{view.parameters:,} parameters: {draft['num_hidden_layers']} layers, blocks of {draft['block_size']}, "
            f"target layers {', '.join(map(str, draft['target_layer_ids']))}{_variant_text(draft)}",
        ),
        ("Settings", settings_text(view.settings)),
    ]
    lines += [("Cache", f"{cache.path} ({cache.manifest[:12]})") for cache in view.caches]
    if view.evaluation:
        lines.append(("Evaluation", evaluation_text(view.evaluation)))
    return lines


def _variant_text(draft: dict[str, Any]) -> str:
    """Return the draft's variant and its fields; nothing for a base draft, whose record does not name it."""
    if (kind := VARIANTS.get(draft.get("architecture", ""))) is None:
        return ""
    return f"; {kind.name}: " + ", ".join(f"{name} {draft[name]}" for name in own_fields(kind))


def progress_text(view: RunView) -> str:
    """Return how far a run is."""
    if view.total_steps:
        text = f"{view.state}: step {view.step:,} of {view.total_steps:,}"
    else:
        text = f"step {view.step:,} of {view.epochs:g} epochs"
    age = view.written_s_ago
    return text if age is None else f"{text}; metrics written {readable_seconds(age)} ago"


def best_text(view: RunView) -> str:
    """Return the checkpoint that would be exported, and why."""
    if view.best_step is None:
        return "none measured yet; the last checkpoint would be exported"
    return (
        f"step {view.best_step:,}: acceptance length {view.best_serving_walk:.2f} in the serving walk over "
        f"held-out samples, of at most {_most_tokens(view.draft)}"
    )


def _most_tokens(draft: dict[str, Any]) -> int:
    """Return how many tokens a round can give: those that are drafted, and the target's own."""
    kind = VARIANTS.get(draft.get("architecture", BASE.architecture), BASE)
    return int(draft["block_size"]) - kind.first_slot + 1


def evaluation_text(result: dict[str, Any]) -> str:
    """Return what a saved evaluation measured, in a line."""
    pooled, kind = result["acceptance"]["pooled"], "serving walk" if result.get("offline") else "live decoding"
    text = f"acceptance length {number(pooled)} (pooled, {kind}, {result['acceptance']['prompts']} prompts)"
    return text + (f"; {result['speedup']:.2f} times as fast" if result.get("speedup") else "")


def settings_text(settings: dict[str, Any]) -> str:
    """Return the settings that matter most, those that are not set left out."""
    shown = [(name, settings.get(name)) for name in SHOWN_SETTINGS]
    return ", ".join(f"{name} {_setting(value)}" for name, value in shown if value is not None)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(map(_setting, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float | None) -> str:
    """Return a number in at most seven characters."""
    if value is None:
        return "-"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3f}"[:7]
    return f"{value:.1e}" if abs(value) < 0.01 or abs(value) >= 1e6 else f"{value:,.0f}"


def print_runs(views: list[RunView]) -> None:
    """Print several runs side by side: how far, how good, in what they differ, and each one's serving walk."""
    print(f"    {'step':>8} {'state':<14} {'best walk':>9} {'held-out loss':>13} {'tokens/s':>9}  run")
    for place, view in enumerate(views, start=1):
        row, last = view.last_validation or {}, view.last_training or {}
        print(
            f"{place:>2}  {view.step:>8,} {view.state:<14} {number(view.best_serving_walk):>9} "
            f"{number(row.get('val_loss')):>13} {number(last.get('tokens_per_s')):>9}  {view.run}"
        )
    width = open_console().width
    for place, view in enumerate(views, start=1):
        for line in view.warnings:
            lines = textwrap.wrap(f"run {place} looks wrong: {line}", width, subsequent_indent="    ")
            print("\n".join(lines))
    print("\nServing walk on held-out samples, by step, all on one scale")
    _print_walks(views)
    print("\nSettings that differ")
    table = compare(views).differing_settings
    for name, values in table.items():
        print(f"  {name}")
        for place, value in enumerate(values, start=1):
            print(f"    {place:>2}  {safe(_setting(value))}")
    if not table:
        print("  none")


def _print_walks(views: list[RunView]) -> None:
    columns = max(open_console().width - 20, 8)
    curves = [bucket_means(view.validation, "val_serving_walk", columns)[1] for view in views]
    everything = [value for values in curves for value in values]
    if not everything:
        print("  none measured yet")
        return
    for place, values in enumerate(curves, start=1):
        signs = curve(values, min(everything), max(everything))
        ends = (values[0], values[-1]) if values else (None, None)
        print(f"{place:>2}  {signs:<{columns}} {number(ends[0]):>7} {number(ends[1]):>7}")
