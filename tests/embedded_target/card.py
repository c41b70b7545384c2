"""The text of the target's model card; measure.py fills in what it measured."""

from string import Template
from typing import Any

from embedded_target.train_target import Recipe

CARD = Template("""\
# The embedded target

A causal language model of 2.9 million parameters (Qwen3 architecture: 10 layers, hidden size 160, 6 heads, 2 key and
value heads, head size 32, MLP 384, 1536 tokens, tied embeddings), small enough to ship with the package and good
enough at a few closed tasks to be worth speculating on. It exists so that extracting, training, measuring and exporting
a drafter can be tried in minutes on a laptop. It is good for nothing else: outside its fourteen kinds of prompts it
writes nonsense.

- Tokenizer: byte-level BPE, digits one by one. `<|im_end|>` ends a turn, `<|endoftext|>` is padding only, `<|mask|>` is
  kept for drafters and occurs in no text.
- Chat template: ChatML, optional system message, generation tags around each answer and its `<|im_end|>`.
- Weights: bfloat16.

## Data
Generated conversations (`tests/embedded_target/conversations.py`): fourteen kinds, several wordings each, closed
vocabularies, no text from anywhere else. One in twenty contents is held out by a hash of what the prompt says, whatever
its wording. All kinds but `letter` and `story` have one right answer.

## Recipe
$phases

Steps hold at most $batch_tokens tokens, padding included, and no conversation is seen twice in a phase. Muon trains
the matrices of the layers (weight decay $weight_decay), AdamW the embedding and the norms; $warmup_steps steps of
warm-up and a cosine to zero in each phase. Answers weigh 1 in the loss, the rest $prompt_weight; bfloat16 autocast
over float32 weights; $processes CPU processes of one thread. `recipe.json` says the same.

## Measured
Greedy answers (float32) to $num held-out conversations, seed $measure_seed. "Well formed" is the form of the kind;
"right" is equal to the reference, or for `letter` and `story` well formed and with everything asked for in it. Later
turns follow the target's own earlier answers. NLL is that of the target's own answer tokens, in nats.

$table

## How to make it again
From the repository's own folder, with its environment on the path:
```bash
export PYTHONPATH=tests
$commands
python -m embedded_target.measure --target target --num $num --seed $measure_seed --card
```
Another machine, or another number of processes, rounds sums in another order and so gives slightly other weights, and
some other answers.

The conversations that ship with it are generated ones, their answers replaced by the target's own with
`dflash regenerate`: `make demo-data` makes both files again and compares them.
""")

_TRAIN = "python -m embedded_target.train_target"


def recipe_text(recipe: dict[str, Any], out: str = "target") -> dict[str, str]:
    """Return a recipe's phases, and the commands that repeat them, for the card."""
    before = recipe.get("init")
    number = 1
    phases = commands = ""
    scale = recipe["learning_rate"] / Recipe.learning_rate
    flags = f"--steps {recipe['steps']} --processes {recipe['processes']} --seed {recipe['seed']}"
    if before is not None:
        earlier = recipe_text(before, "first-phase")
        phases, commands = earlier["phases"] + "\n", earlier["commands"] + "\n"
        number = phases.count("\n") + 1
        flags += f" --init first-phase --rate-scale {scale:g}"
    rates = f"Muon at {recipe['learning_rate']:g}, AdamW at {recipe['other_learning_rate']:g}"
    size = f"{recipe['steps']:,} steps, {recipe['tokens']:,} tokens, seed {recipe['seed']}"
    phases += f"{number}. {size}: {rates}; {recipe['seconds'] / 60:.0f} minutes."
    return {"phases": phases, "commands": f"{commands}{_TRAIN} --out {out} {flags}"}
