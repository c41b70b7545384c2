"""What workers tell of their errors, and what the command makes of those of several."""

import traceback

from dflash_offline.schemas.errors import DflashError, missing_memory


def as_fault(error: Exception, fewer: str) -> DflashError | OSError:
    """Return what a worker tells of an error, to be raised elsewhere; `fewer` says how to start fewer workers."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, (DflashError, OSError)):
        return DflashError(str(error))
    if found := missing_memory(error):
        return DflashError(f"A worker has too little memory: {found}. Let it have more, or start fewer: {fewer}.")
    return DflashError(f"A bug of dflash in a worker:\n{''.join(traceback.format_exception(error))}")


def as_one(faults: list[DflashError | OSError]) -> DflashError | OSError:
    """Return what to raise: a system error that all have met as it is, for commands have advice for it."""
    numbers = {fault.errno if isinstance(fault, OSError) else None for fault in faults}
    if len(numbers) == 1 and None not in numbers:
        return faults[0]
    return DflashError("\n".join(dict.fromkeys(map(fault_message, faults))))


def fault_message(fault: DflashError | OSError) -> str:
    if isinstance(fault, OSError) and fault.filename:
        return f"{fault.filename}: {fault.strerror}"
    return str(fault)
