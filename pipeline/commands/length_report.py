"""What `dflash eval --draft-lengths` prints: what each number of drafted tokens gives, and how many to draft."""

from dflash_offline.schemas.evaluation import EvalResult
from dflash_offline.schemas.results.draft_lengths import DraftLengths, ExpectedSpeeds

AT_ONCE = 3
"""Concurrencies that a table has beside each other."""


def length_lines(result: EvalResult) -> list[str]:
    """Return the report's part on draft lengths; none where they were not measured."""
    found = result.draft_lengths
    if found is None:
        return []
    lines = []
    for i in range(0, max(len(found.expected), 1), AT_ONCE):
        lines += [*_table(found, found.expected[i : i + AT_ONCE]), ""]
    for one in found.expected:
        lines += advice(one)
    lines += [f"note: {note}." for note in found.notes]
    return [*lines, ""]


def advice(one: ExpectedSpeeds) -> list[str]:
    """Return what to draft at a concurrency, for all prompts and for each kind, and what it follows from."""
    best, times = one.num_speculative_tokens, ""
    if one.speedup is not None:
        times = f", {one.speedup[best - 1]:.2f} times plain decoding"
    lines = [f"at {one.concurrency} at a time draft {best}{times}; costs: {one.costs}"]
    if len(set(one.by_kind.values()) - {best}):
        lines.append("  by kind: " + ", ".join(f"{kind} {number}" for kind, number in one.by_kind.items()))
    return lines


def _table(found: DraftLengths, expected: tuple[ExpectedSpeeds, ...]) -> list[str]:
    """Return a row for each number of drafted tokens; the one to draft at a concurrency has a star."""
    lines = ["drafted  length" + "".join(f"{f'ms at {one.concurrency}':>11}{'times':>9}" for one in expected)]
    for i, length in enumerate(found.lengths):
        pooled = length.acceptance.pooled
        cells = [f"{length.num_speculative_tokens:>7}", f"{'-' if pooled is None else f'{pooled:.2f}':>8}"]
        for one in expected:
            times = "-" if one.speedup is None else f"{one.speedup[i]:.2f}"
            star = "*" if i + 1 == one.num_speculative_tokens else " "
            cells.append(f"{one.round_s[i] * 1000:>11.2f}{times:>8}{star}")
        lines.append("".join(cells).rstrip())
    return lines


def length_rows(found: DraftLengths) -> tuple[list[str], list[list[int | float | None]]]:
    """Return the headings and rows of a page's table of all lengths."""
    kinds = list(found.lengths[0].acceptance_by_kind)
    headings = ["drafted tokens", "acceptance length", *kinds, "tokens/s decoding here"]
    for cost in found.costs:
        headings += [f"draft ms at {cost.concurrency}", f"verify ms at {cost.concurrency}"]
    for one in found.expected:
        headings += [f"{name} at {one.concurrency}" for name in ("round ms", "tokens/s", "times plain")]
    rows: list[list[int | float | None]] = []
    for i, length in enumerate(found.lengths):
        row: list[int | float | None] = [length.num_speculative_tokens, length.acceptance.pooled]
        row += [length.acceptance_by_kind[kind].pooled for kind in kinds] + [length.tokens_per_s]
        for cost in found.costs:
            row += [1000 * cost.draft_s[i], 1000 * cost.verify_s[i]]
        for one in found.expected:
            row += [1000 * one.round_s[i], one.tokens_per_s[i], None if one.speedup is None else one.speedup[i]]
        rows.append(row)
    return headings, rows
