"""Which positions of a document can anchor a block: supervised ones with a whole block before the document's end."""

# Axes: T tokens of one document, K block size.

import numpy as np
from numpy.typing import NDArray


def document_anchors(loss_mask: NDArray[np.bool_], block_size: int) -> NDArray[np.int64]:
    """Return the candidates of one document, ascending: supervised positions with K-1 further tokens after them.

    `loss_mask` is bool [T]. A document shorter than K has none.
    """
    return np.flatnonzero(loss_mask[: max(len(loss_mask) - block_size + 1, 0)]).astype(np.int64, copy=False)


def count_anchors(loss_mask: NDArray[np.bool_], block_size: int) -> int:
    """Return how many candidates a document has."""
    return int(np.count_nonzero(loss_mask[: max(len(loss_mask) - block_size + 1, 0)]))
