"""What `dflash eval --server` prints of a live server, beside what was decoded here."""

from dflash_offline.schemas.evaluation import EvalResult, Served, Spread

HEADINGS = ("at once", "tokens/s", "alone", "times", "first ms", "p95", "next ms", "length", "identical")
"""first ms: time to an answer's first token, its median; next ms: time of each further token."""


def served_rows(result: EvalResult) -> list[list[str]]:
    """Return a row for each pass of the server, of the columns of `HEADINGS`; a dash for what is not known."""
    assert result.service is not None
    return [_row(one) for one in result.service.passes]


def _row(one: Served) -> list[str]:
    length = one.counted.acceptance_length if one.counted else None
    return [
        str(one.concurrency),
        f"{one.tokens_per_s:.1f}",
        _number(one.plain_tokens_per_s, 1),
        _number(one.speedup, 2),
        *_milliseconds(one.first_token_s),
        _milliseconds(one.per_token_s)[0],
        _number(length, 2),
        "-" if one.identical is None else f"{one.identical} of {one.prompts}",
    ]


def slot_rows(result: EvalResult) -> list[list[str]]:
    """Return a row for each slot that the server counts: the slot, what it is here, and at each concurrency."""
    assert result.service is not None
    counted = [one.counted for one in result.service.passes]
    if not all(one and one.accepted_by_slot for one in counted):
        return []
    here = [share for share, _ in result.slot_shares()] if result.config.target else []
    served = [[n / max(one.rounds or 0, 1) for n in one.accepted_by_slot or ()] for one in counted if one]
    rows = []
    for slot in range(max(map(len, served))):
        values = [*([here[slot : slot + 1]] if here else []), *(one[slot : slot + 1] for one in served)]
        rows.append([str(slot + 1), *(f"{value[0]:.1%}" if value else "-" for value in values)])
    return rows


def slot_headings(result: EvalResult) -> list[str]:
    """Return the headings of `slot_rows`."""
    assert result.service is not None
    return [
        "slot",
        *(["here"] if result.config.target else []),
        *(f"{p.concurrency} at once" for p in result.service.passes),
    ]


def service_lines(result: EvalResult) -> list[str]:
    """Return the report's part on a live server; none where none was measured."""
    service = result.service
    if service is None:
        return []
    drafts = f", {service.num_speculative_tokens} tokens drafted a round" if service.num_speculative_tokens else ""
    lines = [f"server  {service.url}", f"{service.kind}, model {service.model}{drafts}"]
    if service.compared_with:
        lines.append(f"answers compared with those of {service.compared_with}")
    lines += _table([*HEADINGS], served_rows(result))
    if rows := slot_rows(result):
        lines += ["", "accepted, of all rounds", *_table(slot_headings(result), rows)]
    lines += [f"note: {note}." for note in service.notes]
    return [*lines, ""]


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows)]


def _milliseconds(times: Spread | None) -> tuple[str, str]:
    return ("-", "-") if times is None else (f"{times.median * 1000:.1f}", f"{times.p95 * 1000:.1f}")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
