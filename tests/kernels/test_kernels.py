"""What the compiler makes of flex attention, of a draft's layers and of the loss for an H100, without one.

Shown: the arithmetic of the generated kernels and the tile lists they read, in float32, by Triton's interpreter; that a
step at the shapes of a draft for Qwen3-8B lowers to few whole graphs, what these keep for the backward pass, and that
their kernels assemble for sm_90 with few spills, as ptxas counts them. Not shown: the arithmetic of the other kernels,
the hardware's own rounding, races between threads, and time.

Traced, differentiated, partitioned and lowered is as on a GPU, from fake tensors on one. What is planted to be wrong
must be found.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from qwen3_8b_draft import CONFIG

from dflash_offline.stages.training.memory import kept_by_block_token

pytestmark = pytest.mark.kernels
CASES = [
    ("full", 2, "default", ""),
    ("causal", 1, "default", ""),
    ("window", 1, "narrow", ""),
    ("causal", 1, "default", "window"),
    ("full", 1, "default", "tile"),
    ("full", 1, "default", "transposed tile"),
]
"""Rule of a layer, rows, tiles of the backward kernels, and what is wrong with the mask."""


def run(script: str, *arguments: str, interpreted: bool = False) -> list[Any]:
    """Return what a script of this folder prints, a JSON document a line; it runs in a process with Triton."""
    triton = Path(os.environ.get("DFLASH_TRITON", ""))
    if not (triton / "triton").is_dir():
        pytest.fail(
            f"DFLASH_TRITON is {str(triton)!r}; expected a folder that holds the package `triton`. Run `make "
            f"check-kernels`, which installs it and sets the variable."
        )
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(triton), "TRITON_INTERPRET": str(int(interpreted))},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, int, str, str], list[float]]:
    """Relative errors of flex attention's output and of its gradients, in every case."""
    found = run("interpreted_flex.py", *map(json.dumps, CASES), interpreted=True)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_generated_flex_kernels_give_dense_attention_and_its_gradients(case: Any, errors: dict[Any, Any]) -> None:
    assert len(errors[case]) == 4 and all(error < 1e-5 for error in errors[case])


@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_generated_flex_kernels_show_what_is_wrong_with_a_mask(case: Any, errors: dict[Any, Any]) -> None:
    output, queries, keys, values = errors[case]
    if case[-1] == "transposed tile":  # which only the kernel of keys and values reads
        assert output < 1e-5 and queries < 1e-5
    else:
        assert output > 1e-2 and queries > 1e-2
    assert keys > 1e-2 and values > 1e-2


@pytest.mark.parametrize(("tiles", "spilled", "budget"), [("default", 640, 1.0), ("narrow", 160, 0.5)])
def test_a_step_lowers_for_an_h100_to_whole_graphs_and_few_spills(tiles: str, spilled: int, budget: float) -> None:
    (result,) = run("lowered_step.py", tiles, str(budget))
    assert not result["breaks"]
    # The first layer's input takes no gradient, the last layer leaves rows out, those between share one graph; the loss
    # has one of a whole chunk, and one of the last chunk, of whatever length. A later step adds none.
    assert result["graphs"] == [5, 5, 5]
    counted = kept_by_block_token(CONFIG, compiled=True, budget=budget, checkpointing=False) - 2 * CONFIG.hidden_size
    assert result["kept"] == pytest.approx(2 * counted, rel=0.05)  # bytes of bfloat16
    backward = [one for one in result["kernels"] if re.match(r"triton_tem_.*flex_attention_backward", one["name"])]
    assert backward and len(result["kernels"]) > 30
    assert all(one["stack"] <= (spilled if one in backward else 0) for one in result["kernels"]), result["kernels"]
