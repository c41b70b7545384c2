"""The text of the target's model card; measure.py fills in what it measured."""

from string import Template

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
Generated conversations, see `conversations.py` beside this folder: fourteen kinds, several wordings each, closed
vocabularies, no text from anywhere else. One in twenty contents is held out by a hash of what the prompt says, whatever
its wording. All kinds but `letter` and `story` have one right answer.

## Recipe
$steps steps of at most $batch_tokens tokens (padding included), $tokens tokens without padding, each conversation seen
once. Muon at $learning_rate for the matrices of the layers (weight decay $weight_decay) and AdamW at
$other_learning_rate for the embedding and the norms, $warmup_steps steps of warm-up and a cosine to zero; answers weigh
1 in the loss, the rest $prompt_weight; bfloat16 autocast over float32 weights; $processes CPU processes of one thread,
$minutes minutes. Seed $seed. `recipe.json` says the same.

## Measured
Greedy answers (float32) to $num held-out conversations, seed $measure_seed. "Well formed" is the form of the kind;
"right" is equal to the reference, or for `letter` and `story` well formed and with everything asked for in it. Later
turns follow the target's own earlier answers. NLL is that of the target's own answer tokens, in nats.

$table

## How to make it again
```bash
cd pipeline/embedded
python -m dflash_offline.pipeline.embedded.train_target --out target --steps $steps --processes $processes --seed $seed
python -m dflash_offline.pipeline.embedded.measure --num $num --seed $measure_seed --card
python -m dflash_offline.pipeline.embedded.answer --out conversations.jsonl --num 3000 --split train --seed 1
python -m dflash_offline.pipeline.embedded.answer --out prompts.jsonl --num 240 --split heldout --seed 2
```
The same command on the same machine with the same number of processes gives the same weights; elsewhere sums are
rounded in another order and the weights, hence some answers, differ.
""")
