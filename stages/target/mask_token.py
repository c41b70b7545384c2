"""Which token fills the slots to be drafted: one that no sample contains."""

import re

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.target.files import TargetFiles


def choose_mask_token(
    target: TargetFiles, samples: SampleTable, first_uses: NDArray[np.int64], wanted: int | None
) -> int:
    """Return the token that fills the slots to be drafted: the wanted one, or a reserved one that no sample contains.

    `first_uses` holds for each row of the embedding table the first sample with its token, int64 [V]; -1 for none.

    Raises `DflashError` if it is no row of the embedding table, if a sample contains it, or if none can be found.
    """
    tokenizer, num_rows = target.tokenizer, int(target.text_config.vocab_size)
    if wanted is not None:
        if not 0 <= wanted < num_rows:
            raise DflashError(
                f"--mask-token-id {wanted} is no row of the target's embedding table of {num_rows}. Name one that is."
            )
        if (sample := int(first_uses[wanted])) >= 0:
            raise DflashError(
                f"--mask-token-id {wanted} ({tokenizer.convert_ids_to_tokens(wanted)!r}) occurs in the data, first in "
                f"{samples.origin(sample)}. Name a token that no sample contains."
            )
        return wanted
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < num_rows}
    used = set(np.flatnonzero(first_uses >= 0).tolist())
    taken = used | target.end_ids() | {tokenizer.bos_token_id}
    free = {i: name for i, name in special.items() if i not in taken}

    def preference(item: tuple[int, str]) -> tuple[int, int]:
        index, name = item
        ordinary = index in (tokenizer.pad_token_id, tokenizer.unk_token_id)
        reserved = re.search(r"mask|reserved|unused|extra", name, re.IGNORECASE)
        return (0 if "mask" in name.lower() else 1 if reserved else 3 if ordinary else 2), index

    if not free:
        raise DflashError(
            f"{target.name} has no reserved token for the slots to be drafted: each of its {len(special)} special "
            f"tokens is used by the data or ends a text. Name an unused row of the embedding table (0 to "
            f"{num_rows - 1}) with --mask-token-id."
        )
    return min(free.items(), key=preference)[0]
