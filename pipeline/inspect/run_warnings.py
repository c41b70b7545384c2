"""What looks wrong in a run: rules of thumb, each with what to do about it."""

import statistics

from dflash_offline.pipeline.inspect.run_view import Rows, RunView

MIN_ROWS = 10
"""Rows of metrics before trends are judged."""
WAIT_SHARE = 0.2
"""Share of the time spent waiting for data above which reading is too slow for training."""
GROWTH = 3.0
"""Times that the gradient norm's median of the last rows may exceed that of the middle ones."""
LOSS_RISE = 1.1
"""Times that a loss may exceed its own best."""
STALE_VALIDATIONS = 4
"""Validations without a better serving walk after which a run has got worse rather than been unlucky."""
HOPELESS_WALK = 1.1
"""Serving walk in tokens a round, halfway or later, that hardly differs from decoding without a draft."""


def run_warnings(view: RunView) -> list[str]:
    """Return one line for each thing that looks wrong, the gravest first; none for a run that looks sound."""
    rules = (_files, _not_finite, _training_loss, _gradients, _validation, _waiting)
    return [line for rule in rules for line in rule(view)]


def _files(view: RunView) -> list[str]:
    lines = [f"cache {cache.path}: {cache.fault}." for cache in view.caches if cache.fault]
    if view.unreadable_rows:
        lines.append(f"{view.unreadable_rows} lines of metrics.jsonl cannot be read and are left out.")
    if view.step and not view.checkpoints:
        lines.append("no checkpoint is saved: an interruption loses every step. Lower --save-every.")
    return lines


def _not_finite(view: RunView) -> list[str]:
    rows = view.training + view.validation
    steps = [row["step"] for row in rows if any(value is None for value in row.values())]
    return [f"a figure is not finite from step {min(steps)} on. Lower --learning-rate."] if steps else []


def _numbers(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _training_loss(view: RunView) -> list[str]:
    losses = _numbers(view.training, "loss")
    if len(losses) < MIN_ROWS:
        return []
    size = max(3, len(losses) // 10)
    last = statistics.median(losses[-size:])
    best = min(statistics.median(losses[i : i + size]) for i in range(len(losses) - size + 1))
    if last > LOSS_RISE * best:
        return [f"training loss has risen to {last:.3f} from {best:.3f}. Lower --learning-rate."]
    return []


def _gradients(view: RunView) -> list[str]:
    norms = _numbers(view.training, "grad_norm")
    if len(norms) < 2 * MIN_ROWS:
        return []
    fifth = len(norms) // 5
    middle, last = statistics.median(norms[2 * fifth : 3 * fifth]), statistics.median(norms[-fifth:])
    if last > GROWTH * middle:
        return [f"the gradient norm grows: {last:.3g}, from {middle:.3g} in mid-run. Lower --learning-rate."]
    return []


def _validation(view: RunView) -> list[str]:
    rows, lines = view.validation, []
    if not rows:
        never = view.settings["val_samples"] == 0 or view.step > view.settings["val_every"]
        return ["no validation: no sample is held out, so best is just last. Raise --val-samples."] if never else []
    walks, losses = _numbers(rows, "val_serving_walk"), _numbers(rows, "val_loss")
    since = len(walks) - 1 - max(range(len(walks)), key=walks.__getitem__) if walks else 0
    if since >= STALE_VALIDATIONS:
        lines.append(
            f"validation gets worse: no better serving walk in the last {since} validations "
            f"({max(walks):.2f}, now {walks[-1]:.2f})."
        )
    if losses and losses[-1] > LOSS_RISE * min(losses):
        lines.append(
            f"held-out loss has risen to {losses[-1]:.3f} from {min(losses):.3f}: the draft learns its training "
            f"samples by heart. More data, or fewer --epochs."
        )
    total = view.total_steps
    if total and walks and rows[-1]["step"] >= total / 2 and max(walks) < HOPELESS_WALK:
        lines.append(
            f"the serving walk is {max(walks):.2f} tokens a round, hardly better than no draft. Check the cache "
            f"with `dflash verify CACHE --target MODEL`."
        )
    return lines


def _waiting(view: RunView) -> list[str]:
    shares = _numbers(view.training, "data_wait_share")[-MIN_ROWS:]
    if len(shares) == MIN_ROWS and statistics.median(shares) > WAIT_SHARE:
        return [
            f"steps wait for data {statistics.median(shares):.0%} of the time. Raise --loader-threads, or put the "
            f"cache on a faster disk."
        ]
    return []
