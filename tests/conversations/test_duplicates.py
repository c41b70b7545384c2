"""The compact set of digests, against Python's own."""

import random

import pytest

from dflash_offline.stages.conversations.duplicates import Digests


@pytest.mark.parametrize("spread", [1 << 128, 5000], ids=["hashes", "crowded"])
def test_a_digest_is_new_once(spread: int) -> None:
    chance = random.Random(0)
    digests, known = Digests(), set[bytes]()
    for _ in range(20_000):
        digest = chance.randrange(1, spread).to_bytes(16)
        assert digests.add(digest) == (digest not in known)
        known.add(digest)
    assert not any(digests.add(digest) for digest in known)


def test_digests_take_little_more_than_their_bytes() -> None:
    chance = random.Random(0)
    digests = Digests()
    for count in range(1, 30_000):
        digests.add(chance.randbytes(16))
        if count > 2000:
            assert sum(map(len, digests._tables)) < 25 * count
