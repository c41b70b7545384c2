"""Which layers a draft reads where nobody chooses, as the reference client has them."""

import pytest

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.target.layer_ids import check_layer_ids, default_layer_ids


def test_default_layers_follow_the_reference_rule() -> None:
    assert default_layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert default_layer_ids(36, 1) == (18,)
    assert default_layer_ids(6, None) == (1, 2, 3)
    with pytest.raises(DflashError, match="largest usable number is 3"):
        default_layer_ids(6, 5)
    with pytest.raises(DflashError, match=r"as in --layers 0,1,2\."):  # the layers that a target of four has
        default_layer_ids(4, 7)


@pytest.mark.parametrize("ids", [(), (1, 1), (2, 1), (-1, 2), (1, 5)])
def test_layers_that_cannot_be_captured_are_refused(ids: tuple[int, ...]) -> None:
    assert check_layer_ids((0, 2, 4), 6) == (0, 2, 4)
    with pytest.raises(DflashError, match="unique ascending ids from 0 to 4"):
        check_layer_ids(ids, 6)
