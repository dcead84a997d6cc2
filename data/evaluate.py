"""Held-out losses and answers of a model. The processes share the work."""

import math

import numpy as np
import torch

from data.metrics import score
from data.sets import evenly
from lib.device import to_device


@torch.no_grad()
def text_metrics(model, valid_set, n_rows, batch_size, world):
    """val_loss, in nats a target token, and the same in bits per byte of the targets' text, which
    models with other tokenizers can be compared by."""
    sums = np.zeros(3)  # nats, targets, bytes
    for number, batch in enumerate(valid_set.held_out(n_rows, batch_size)):
        if number % world.size == world.rank:
            src, tgt, loss_mask = to_device(batch, world.device)
            with world.autocast():
                sums[0] += model(src, tgt, loss_mask).item()
            batch[2][:, 0] &= model.config.bos_id >= 0  # without bos, nothing predicts the first
            targets = batch[1][batch[2]].tolist()
            sums[1:] += len(targets), len(valid_set.tokenizer.bytes_of(targets))
    nats, n_targets, n_bytes = world.sum(*sums)
    bits = nats / math.log(2)
    return dict(val_loss=nats / max(1, n_targets), bits_per_byte=bits / max(1, n_bytes))


@torch.no_grad()
def show_text(model, valid_set, world):
    """One held-out row and the model's answer to it, for people."""
    tokenizer = valid_set.tokenizer
    src, tgt, loss_mask = next(valid_set.held_out(1, 1))
    if valid_set.dec:  # decoder-only: what is before the first target; half of a causal row
        start = int(loss_mask[0].argmax())
        prompt = tgt[0, : start if start > 1 else tgt.shape[1] // 2].tolist()
    else:
        prompt = src[0][src[0] != tokenizer.pad].tolist()
    with world.autocast():
        answer = [new[0] for new in model.generate([prompt], 64)]
    return f"{tokenizer.show(prompt)} >>> {tokenizer.show(answer)}"


@torch.no_grad()
def task_losses(model, pairs, rows, world):
    """val_loss, in nats a target token, and shuffled_loss, where each target stands beside the
    source of another row: a model that does not read its source has the same loss in both."""
    order = sorted(rows, key=lambda row: pairs.lengths[row].sum())
    others, sums = dict(zip(order, np.roll(order, len(order) // 2))), np.zeros(3)
    groups = [order[i : i + 32] for i in range(0, len(order), 32)]
    for group in groups[world.rank :: world.size]:
        for k, sources in enumerate((group, [others[row] for row in group])):
            src, tgt, loss_mask = to_device(pairs.batch(group, sources), world.device)
            with world.autocast():
                sums[k] += model(src, tgt, loss_mask).item()
        sums[2] += int(loss_mask.sum())
    true, shuffled, n = world.sum(*sums)
    return dict(val_loss=true / n, shuffled_loss=shuffled / n)


@torch.no_grad()
def write_answers(model, pairs, rows, max_new_tokens, world, batch_size=128):
    """Greedy answers to the sources of these rows, as texts. Without autocast, which would cast all
    weights at every step: that takes longer than the step."""
    order = sorted(rows, key=lambda row: len(pairs.sources[row]), reverse=True)
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found = {}
    for group in world.progress(groups[world.rank :: world.size], "answering", leave=False):
        prompts = [pairs.prompt(row) for row in group]
        steps = list(model.generate(prompts, max_new_tokens))
        for b, row in enumerate(group):
            ids = [step[b] for step in steps if step[b] is not None]
            found[row] = pairs.tokenizer.decode(ids)
    found = {row: text for part in world.gather(found) for row, text in part.items()}
    return [found[row] for row in rows]


def task_metrics(model, valid_set, n_rows, world, with_answers=True):
    """Losses, and the task's scores of greedy answers, on n_rows held-out rows; 0 is all."""
    task, pairs = valid_set.task, valid_set.pairs
    rows = evenly(len(pairs.rows), n_rows)
    metrics = task_losses(model, pairs, rows, world)
    if with_answers:
        texts = write_answers(model, pairs, rows, pairs.tgt_len, world)
        held_out = [pairs.rows[row] for row in rows]
        metrics |= score(task, texts, held_out)
        source, target = held_out[0]["source"][:300], held_out[0]["target"][:300]
        world.say(f"--- source: {source}\n>>> {texts[0][:300]}\n=== {target}\n---")
    return metrics
