"""The draft's shape, from the settings and the cache."""

from pathlib import Path

import pytest

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.draft_setup import resolve_draft_config


def config_of(cache: Path, **settings: object):
    return resolve_draft_config(TrainConfig(caches=(cache,), out=cache, **settings), Corpus.open((cache,)), None)


def test_a_window_holds_for_every_draft_layer_unless_some_are_named(cache: Path) -> None:
    assert config_of(cache).sliding_layers == ()
    every = config_of(cache, sliding_window=64)
    assert (every.sliding_window, every.sliding_layers, every.causal_layers) == (64, (0, 1, 2), "none")
    some = config_of(cache, sliding_window=64, sliding_layers=(0, 1), causal_layers="sliding")
    assert (some.sliding_window, some.sliding_layers, some.causal_layers) == (64, (0, 1), "sliding")


def test_sliding_layers_without_a_window_are_refused(cache: Path) -> None:
    with pytest.raises(DflashError, match=r"sliding_layers is 0, and sliding_window is not given.*--sliding-window"):
        config_of(cache, sliding_layers=(0,))
