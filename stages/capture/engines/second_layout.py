"""The proof of an engine's states where transformers cannot hold the target: a second layout of the engine itself.

It runs one sample at a time, in short pieces, computes every prefix anew, compiles nothing and has its workers in
processes of their own. Its numbering of layers is proved at both ends: what goes into the first layer must be the
embedding table's rows, and what the last one puts out must lead to the very tokens that the engine draws, and to their
probabilities.

Axes: T tokens, L layers, H hidden size.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.compare import LayerComparison
from dflash_offline.stages.capture.engines.installed import PREFIX_CACHING
from dflash_offline.stages.capture.engines.states import StateEngine
from dflash_offline.stages.capture.engines.trial import Reference, trial_ids
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.target.borrowed import read_borrowed

_OTHERWISE = {
    PREFIX_CACHING: False,
    "max_num_seqs": 1,
    "enforce_eager": True,
    "distributed_executor_backend": "mp",
    "logprobs_mode": "raw_logprobs",
}
_PIECE_TOKENS = 64
_AGREEING_SHARE = 0.75
"""Share of the samples whose next token must follow from the last layer: few logits tie, and kernels round apart."""
_LARGEST_SHIFT = 0.2
"""Difference of a drawn token's log-probability, in the median of the samples, that rounded logits may explain."""
_EMBEDDING = -1
"""The layer whose output would be what goes into layer 0."""


class SecondLayout:
    """What vLLM's states are held against where transformers cannot run the target."""

    def __init__(self, config: ExtractConfig, target: ChosenTarget, why: str) -> None:
        """`why` says what keeps transformers from it. Raises `DflashError` if the ends cannot be proved either."""
        self._why = why.rstrip(".")
        try:
            self._borrowed = read_borrowed(target.files, target.dtype)
        except DflashError as error:
            raise DflashError(
                f"vLLM's states are proved before a shard is written, by transformers or by a second layout of vLLM. "
                f"transformers cannot run {target.files.folder}: {self._why}. "
                f"A second layout cannot prove them: {error}"
            ) from error
        num_layers = target.files.num_layers
        self._comparison = LayerComparison(target.layer_ids, num_layers, int(target.files.text_config.hidden_size))
        layers = tuple(sorted({_EMBEDDING, *self._comparison.around, num_layers - 1}))
        self._target = replace(target, layer_ids=layers)
        pieces = min(_PIECE_TOKENS, config.batch_tokens)
        self._config = replace(config, batch_tokens=pieces, engine_args={**config.engine_args, **_OTHERWISE})

    def embeddings(self) -> dict[str, Tensor]:
        """Return the target's embedding table, and its head unless it is the same."""
        return self._borrowed.tensors()

    def states(self, samples: SampleTable, progress: Progress) -> Reference:
        """Return states of some samples of the plan; `DflashError` if the layers are not those they are called."""
        ids = trial_ids(samples)
        progress.say(
            f"transformers cannot run {self._target.files.folder}: {self._why}. vLLM's states are held against those "
            f"of a second layout of vLLM instead (one sample at a time, in pieces of {self._config.batch_tokens} "
            f"tokens, without cached prefixes or compiled graphs), whose numbering of layers is proved by the "
            f"embedding and by the tokens that its last layer leads to. A fault of vLLM's that both layouts share "
            f"would not show."
        )
        engine, drawn = StateEngine(self._config, self._target), dict[int, tuple[int, float]]()
        try:
            engine.start(max(sum(map(len, ids)), self._config.max_length))
            states = engine.states(ids, drawn)
        finally:
            engine.close()
        faults = self._faults(ids, states, drawn)
        if faults:
            raise DflashError(
                "vLLM's layers are not those they are called, so nothing is extracted:"
                + "".join(f"\n  {fault}" for fault in faults)
                + "\nTry another release of vLLM or other --engine-args."
            )
        columns = [self._target.layer_ids.index(layer) for layer in self._comparison.around]
        kept = [[state[:, column].numpy() for column in columns] for state in states]
        final = [self._borrowed.norm(state[:, -1]).numpy() for state in states]
        return Reference("a second layout of vLLM", self._comparison, ids, kept, final)

    def _faults(self, ids: list[list[int]], states: list[Tensor], drawn: dict[int, tuple[int, float]]) -> list[str]:
        faults = []
        table = self._borrowed.table
        if not all(torch.equal(state[:, 0], table[one].float()) for one, state in zip(ids, states, strict=True)):
            faults.append("what goes into layer 0 is not the embedding table's rows (one layer off, or scaled rows)")
        agree, shifts = [], []
        for number, state in enumerate(states):
            own, (token, log_probability) = self._borrowed.log_probabilities(state[-1, -1]), drawn[number]
            agree.append(int(own.argmax()) == token)
            shifts.append(abs(float(own[token]) - log_probability))
        if np.mean(agree) < _AGREEING_SHARE:
            faults.append(
                f"the last layer leads to the token that vLLM draws in {sum(agree)} of {len(agree)} samples (another "
                f"layer, or another final norm or head than its weights say)"
            )
        elif not np.median(shifts) <= _LARGEST_SHIFT:
            faults.append(
                f"the last layer gives what vLLM draws another log-probability, by {np.median(shifts):.2f} in the "
                f"median (expected at most {_LARGEST_SHIFT}: another final norm or head than its weights say)"
            )
        for column, layer in enumerate(self._target.layer_ids[1:], 1):
            if all(torch.equal(state[:, column], state[:, column - 1]) for state in states):
                faults.append(f"layer {layer} repeats layer {self._target.layer_ids[column - 1]}")
        return faults

    def close(self) -> None:
        """Nothing is held any more: the second layout ended before the first began."""
