"""Trains the shipped target from nothing: tokenizer, then a small Qwen3 on generated conversations.

    python -m embedded_target.train_target --out DIR --steps N --processes P --seed S

Each process computes with one thread on its share of every batch: for a model this small that is faster than one
process with several threads. The same steps, seed and processes on the same machine give the same weights.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from embedded_target.conversations import Message, generate
from embedded_target.target_tokenizer import VOCAB_SIZE, train_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

# Axes: B rows, S positions, V vocabulary.


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, saved beside them as recipe.json."""

    steps: int
    seed: int
    batch_tokens: int = 2048
    """Padded tokens of a step."""
    pool: int = 1024
    """Conversations that are sorted by length together, so that a batch holds rows of similar length."""
    learning_rate: float = 0.02
    """Peak rate of Muon, which trains the matrices of the layers."""
    other_learning_rate: float = 3e-3
    """Peak rate of AdamW, which trains the embedding and the norms."""
    warmup_steps: int = 100
    weight_decay: float = 0.01
    prompt_weight: float = 0.1
    """Loss weight of the tokens that the user and the template say; answers weigh 1."""
    tokenizer_conversations: int = 20000
    init: Path | None = None
    """Target folder to go on from, with its tokenizer; None starts from nothing."""


def build_model(tokenizer: Any) -> Any:
    """Return an untrained Qwen3ForCausalLM of 2.9 million parameters, float32."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("eager")  # for rows this short, faster on the CPU than the fused kernel
    for layer in model.model.layers:
        # Every layer starts as the identity, so that no token's identity is drowned, and attention starts sharper.
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 2.0)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def encode(tokenizer: Any, messages: tuple[Message, ...]) -> tuple[list[int], list[int]]:
    """Return the token ids of a conversation and 1 for each that the assistant says."""
    encoded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def batches(tokenizer: Any, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (token ids, loss weights), both [B, S], one conversation a row, padded on the right.

    A row starts at position 0 and sees only itself, as when it is served. Padding weighs 0.
    """
    stream = generate("train", recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    left: list[tuple[list[int], list[int]]] = []
    while True:
        pool = left + [encode(tokenizer, conversation.messages) for conversation in islice(stream, recipe.pool)]
        pool.sort(key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if (len(groups[-1]) + 1) * len(pair[0]) > recipe.batch_tokens:
                groups.append([])
            groups[-1].append(pair)
        left = groups.pop()  # not full: waits for the next pool
        for i in torch.randperm(len(groups), generator=generator).tolist():
            shape = (len(groups[i]), len(groups[i][-1][0]))
            ids_BS, weights_BS = torch.full(shape, tokenizer.pad_token_id), torch.zeros(shape)
            for row, (ids, said) in enumerate(groups[i]):
                ids_BS[row, : len(ids)] = torch.tensor(ids)
                weights_BS[row, : len(ids)] = torch.tensor(said).clamp(min=recipe.prompt_weight)
            yield ids_BS, weights_BS


def rate(step: int, recipe: Recipe) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def weighted_loss(model: Any, ids_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Return the sum of the next-token losses times their weights, a float32 scalar."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_BSV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits_BSV.float().flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="none")
    return (losses * weights_BS[:, 1:].flatten()).sum()


def matrices_of(model: Any) -> list[Tensor]:
    """Return the matrices of the layers: what Muon trains."""
    return [p for p in model.model.layers.parameters() if p.ndim == 2]


def make_optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for this process's share of the layers' matrices, and AdamW for everything that is not one."""
    matrices = matrices_of(model)
    inside = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in inside]
    mine = matrices[dist.get_rank() :: dist.get_world_size()]
    return [
        torch.optim.Muon(mine, lr=recipe.learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def add_up(tensors: list[Tensor]) -> None:
    """Replace every tensor by its sum over the processes."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def update(model: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    """Take one step on the gradients of all processes; afterwards all processes hold the same weights.

    Every process orthogonalizes only its share of the matrices, which is the costly part, and hands it to the others.
    """
    add_up([p.grad for p in model.parameters()])
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()  # not the optimizers': no process's optimizers know all the matrices
    matrices = matrices_of(model)
    for i, matrix in enumerate(matrices):
        if i % dist.get_world_size() != dist.get_rank():
            matrix.zero_()
    add_up(matrices)


def save(model: Any, tokenizer: Any, recipe: Recipe, folder: Path, progress: dict[str, float]) -> None:
    """Write the model folder in bfloat16, with the recipe and how far it has come."""
    copy = build_model(tokenizer)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    facts = {**asdict(recipe), "init": None, "processes": dist.get_world_size(), **progress}
    if recipe.init is not None:
        facts["init"] = json.loads((recipe.init / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(facts, indent=2) + "\n")


def train(tokenizer: Any, recipe: Recipe, folder: Path, *, log_every: int = 25, save_every: int = 250) -> None:
    """Train a target together with the other processes of the group; process 0 leaves it in the folder."""
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(recipe.seed)
    model = build_model(tokenizer).train()
    if recipe.init is not None:
        model.load_state_dict(Qwen3ForCausalLM.from_pretrained(recipe.init, dtype=torch.float32).state_dict())
    optimizers = make_optimizers(model, recipe)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    begin, tokens, smooth = time.monotonic(), 0, 0.0
    for step, (ids_BS, weights_BS) in enumerate(islice(batches(tokenizer, recipe), recipe.steps)):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(step, recipe)
        mine = slice(rank, None, num_processes)
        loss = weighted_loss(model, ids_BS[mine], weights_BS[mine]) / weights_BS[:, 1:].sum()
        loss.backward()
        update(model, optimizers)
        tokens += int((weights_BS > 0).sum())
        estimate = loss.item() * num_processes
        if not math.isfinite(estimate):
            raise FloatingPointError(f"The loss of step {step + 1} is {estimate}: lower the learning rates.")
        smooth = estimate if step == 0 else 0.98 * smooth + 0.02 * estimate
        done, passed, last = step + 1, time.monotonic() - begin, step + 1 == recipe.steps
        if rank == 0 and (done % log_every == 0 or last):
            speed = f"tokens {tokens} tokens/s {tokens / passed:.0f}"
            print(f"step {done}/{recipe.steps} loss {smooth:.4f} {speed}", flush=True)
        if rank == 0 and (done % save_every == 0 or last):
            save(model, tokenizer, recipe, folder, {"steps_done": done, "tokens": tokens, "seconds": round(passed)})


def work(rank: int, num_processes: int, meeting: str, recipe: Recipe, folder: Path) -> None:
    """Train as process `rank` of a group that meets through a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_processes)
    train(AutoTokenizer.from_pretrained(folder), recipe, folder)
    dist.destroy_process_group()


def main() -> None:
    """Read the command line, train the tokenizer, train the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the new target")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="another seed brings other conversations")
    parser.add_argument("--init", type=Path, help="target folder to go on from")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="share of the usual learning rates")
    args = parser.parse_args()
    if args.init is None:
        texts = islice(generate("train", args.seed), Recipe.tokenizer_conversations)
        tokenizer = train_tokenizer("{role}\n{content}".format(**message) for one in texts for message in one.messages)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.init)
    tokenizer.save_pretrained(args.out)
    recipe = Recipe(
        steps=args.steps,
        seed=args.seed,
        init=args.init,
        learning_rate=Recipe.learning_rate * args.rate_scale,
        other_learning_rate=Recipe.other_learning_rate * args.rate_scale,
    )
    print(recipe, flush=True)
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(work, (args.processes, f"{meeting}/group", recipe, args.out), nprocs=args.processes)


if __name__ == "__main__":
    main()
