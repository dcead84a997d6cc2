"""What a training loop reads: sets whose rows are a pure function of their numbers. Needs no torch.

    open_data(cfg, say, n_rows) -> (train_set, valid_set)

Either set has `tokenizer`, `name`, `hash`, `metric`, `varied`, `samples()` and `batch(step, rows)`,
where `rows` are numbers in the global batch of a step.
"""

import functools
import hashlib
import json

import numpy as np

from data.corpus import prepare
from data.metrics import score
from data.objectives import OBJECTIVES, make_batch, uniforms
from data.tasks import IMAGE, SIDES, load_task
from data.tokenizer import load_tokenizer, train_tokenizer
from lib.settings import UserError, given


def open_data(cfg, say, n_rows):
    """The sets of cfg.data for cfg.objective. n_rows: rows of a step, of all its passes and
    processes."""
    if cfg.objective == "seq2seq":
        return open_task(cfg, say, n_rows)
    corpus = prepare(cfg.data, cfg.tokenizer, cfg.vocab_size, say, cfg.max_tokens)
    say(corpus.describe())
    tell_ignored(cfg, corpus.tokenizer, say)
    return tuple(TextSet(corpus, split, cfg) for split in ("train", "val"))


def tell_ignored(cfg, tokenizer, say):
    if cfg.tokenizer != "bpe" and "vocab_size" in given():
        size = f"--tokenizer={cfg.tokenizer} has {tokenizer.vocab_size} ids"
        say(f"--vocab_size={cfg.vocab_size} is ignored: {size}")


def decoder_only(cfg):
    """False, or what --arch is: "dec" or "prefix"."""
    return cfg.arch != "encdec" and cfg.arch


class TextSet:
    """Windows of a split of a corpus, made into rows by an objective."""

    metric = None  # the last checkpoint counts

    def __init__(self, corpus, split, cfg):
        self.name, self.hash, self.tokenizer = cfg.data, corpus.hash, corpus.tokenizer
        self.tokens, self.seed, self.dec = corpus.splits[split], cfg.seed, decoder_only(cfg)
        if cfg.objective == "causal" and not self.dec:
            raise UserError(
                "--objective=causal has no source and is for --arch=dec; use span, prefix or ul2"
            )
        # A decoder-only row has a separator, so one token less of source.
        room = cfg.src_len - (bool(self.dec) and cfg.objective != "causal")
        self.objective = OBJECTIVES[cfg.objective](self.tokenizer, room, cfg.tgt_len)
        window = self.objective.window
        if len(self.tokens) < window:
            raise UserError(
                f"--data={cfg.data}: the {split} text has {len(self.tokens)} tokens, but a row "
                f"takes {window}: give more text, or lower --src_len and --tgt_len"
            )
        # Span rows are all of one length; other rows are padded to fixed shapes.
        self.widths = None if cfg.objective in ("span", "causal") else (cfg.src_len, cfg.tgt_len)
        self.varied = bool(self.dec and self.widths)  # whether batches differ in targets or shape

    def make(self, starts, u):
        """The batch of the windows that begin at `starts` (B,), with the chances u."""
        ids = self.tokens.windows(starts, self.objective.window)
        sources, targets = self.objective.rows(ids, u)
        return make_batch(sources, targets, self.tokenizer, self.dec, self.widths)

    def batch(self, step, rows):
        u = uniforms(self.seed, step, rows, self.objective.n_random + 1)
        last = len(self.tokens) - self.objective.window
        return self.make((u[:, 0] * (last + 1)).astype(np.int64), u[:, 1:])

    def samples(self):
        """A few held-out rows, by which an export is checked later."""
        return as_samples(next(self.held_out(16, 16)))

    def held_out(self, n_rows, batch_size):
        """Batches of windows, evenly spaced over the text; n_rows=0: side by side over all of it.
        In causal rows a token then counts once: what the window before has scored is context."""
        window, last = self.objective.window, len(self.tokens) - self.objective.window
        causal = self.objective.__class__ is OBJECTIVES["causal"]
        starts = np.linspace(0, last, n_rows).astype(int)
        if n_rows == 0:  # the last window reaches back; causal ones share a token to predict from
            starts = np.append(np.arange(0, last, window - causal), last)
        for i in range(0, len(starts), batch_size):
            rows = np.arange(i, min(i + batch_size, len(starts)))
            # A seed of its own: no held-out row shares its holes with a training row.
            u = uniforms(self.seed + 1, 0, rows, self.objective.n_random)
            src, tgt, loss_mask = self.make(starts[rows], u)
            if causal and n_rows == 0:
                context = np.where(rows > 0, starts[rows - 1] + window - starts[rows], 1)
                loss_mask &= np.arange(window)[None] >= context[:, None]
            yield src, tgt, loss_mask


def as_samples(batch):
    """A batch for samples.json of a run: dict(src, tgt, loss_mask) of nested lists."""
    parts = zip(("src", "tgt", "loss_mask"), batch)
    return {name: None if part is None else part.tolist() for name, part in parts}


# ----------------------------------------------------------------------------------------------
# Tasks: rows of source and target


def open_task(cfg, say, n_rows):
    task, sets = load_task(cfg.data, cfg.source_col, cfg.target_col, say), []
    tokenizer = task_tokenizer(cfg, task.splits["train"], say)
    for split in ("train", "val"):
        pairs = Pairs(task.splits[split], tokenizer, cfg.src_len, cfg.tgt_len, decoder_only(cfg))
        say(f"{task.name}, {split}: {pairs.describe()}")
        sets.append(TaskSet(task, pairs, n_rows, cfg))
    return sets


def task_tokenizer(cfg, rows, say):
    """--tokenizer, trained on these rows if it is bpe."""
    if cfg.tokenizer == "bpe":
        texts = (row[side].replace(IMAGE, "") for row in rows for side in SIDES)
        return train_tokenizer(texts, cfg.vocab_size)
    tokenizer = load_tokenizer(cfg.tokenizer)
    tell_ignored(cfg, tokenizer, say)
    return tokenizer


class Pairs:
    """The rows of one split, as ids. A source ends with end-of-sequence, and so does a target
    that was not cut. What is too long is cut off at its end and counted in `cut`, `cut_targets`."""

    def __init__(self, rows, tokenizer, src_len, tgt_len, decoder_only):
        self.rows, self.tokenizer, self.dec, self.tgt_len = rows, tokenizer, decoder_only, tgt_len
        room = src_len - 1 - bool(decoder_only)  # for the end and the separator
        if room < 1 or tgt_len < 2:
            raise UserError(f"--src_len={src_len} --tgt_len={tgt_len} leave no room for a row")
        sources, targets = self.encode(rows), tokenizer.encode_batch([r["target"] for r in rows])
        self.cut = sum(len(ids) > room for ids in sources)
        self.cut_targets = sum(len(ids) > tgt_len - 1 for ids in targets)
        self.sources = [np.array([*ids[:room], tokenizer.eos]) for ids in sources]
        self.targets = [np.array([*ids, tokenizer.eos][:tgt_len]) for ids in targets]
        lengths = [(len(s), len(t)) for s, t in zip(self.sources, self.targets)]
        self.lengths = np.array(lengths)  # (rows, 2)

    def encode(self, rows):
        return self.tokenizer.encode_batch([row["source"] for row in rows])

    def describe(self):
        src, tgt = self.lengths.mean(0)
        return (
            f"{len(self.rows):,} rows of {src:.0f} source and {tgt:.0f} target tokens on average; "
            f"too long and cut: {self.cut:,} sources, {self.cut_targets:,} targets"
        )

    def prompt(self, row):
        """What `generate` is given for a row."""
        ids = self.sources[row].tolist()
        return ids + [self.tokenizer.sep] if self.dec else ids

    def batch(self, rows, sources_of=None, targets=None):
        """(src, tgt, loss_mask) of these rows. sources_of: each target beside the source of that
        row. targets: lists of ids in the place of the rows' own."""
        sources = [self.sources[i] for i in (rows if sources_of is None else sources_of)]
        targets = targets or [self.targets[i] for i in rows]
        return make_batch(sources, targets, self.tokenizer, self.dec)


class TaskSet:
    """Batches of rows of like length, as a pure function of seed and step: each epoch sorts the
    rows by length, a little blurred so that no two epochs have the same neighbours, cuts the line
    where a batch would exceed a budget of positions, and shuffles the batches. Every row comes
    once an epoch."""

    varied = True

    def __init__(self, task, pairs, n_rows, cfg):
        self.task, self.pairs, self.tokenizer, self.name = task, pairs, pairs.tokenizer, task.name
        digest = json.dumps([pairs.rows, self.tokenizer.hash()], default=repr)
        self.hash = hashlib.sha256(digest.encode()).hexdigest()[:12]
        self.n_rows, self.seed = n_rows, cfg.seed
        self.metric = next(iter(score(task, ["x"], pairs.rows[:1])))  # the task's own comes first
        self.budget = n_rows * (cfg.src_len + cfg.tgt_len)
        self.plan = functools.lru_cache(maxsize=2)(self.make_plan)
        self.ends = [0]  # steps before each epoch, as far as was asked

    def samples(self):
        """A few rows, by which an export is checked later."""
        return as_samples(self.pairs.batch(evenly(len(self.pairs.rows), 16)))

    def make_plan(self, epoch):
        """Row numbers of every step of an epoch."""
        # No row of TextSet has this counter.
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 1, 0, epoch]))
        lengths = self.pairs.lengths
        src, tgt = (lengths * (1 + 0.1 * rng.random(lengths.shape))).T
        if self.pairs.dec:
            order, widths = np.argsort(src + tgt, kind="stable"), lengths.sum(1, keepdims=True) + 1
        else:  # strata of like sources; within each by target, up and down in turn
            widths = lengths
            n = max(1, round((lengths.sum() / self.budget) ** 0.5))
            stratum = np.empty(len(src), dtype=int)
            stratum[np.argsort(src, kind="stable")] = np.arange(len(src)) * n // len(src)
            order = np.lexsort((np.where(stratum % 2, -tgt, tgt), stratum))
        batches, start, widest = [], 0, np.zeros(widths.shape[1], dtype=int)
        for i, row in enumerate(order):
            wider = np.maximum(widest, widths[row])
            if i > start and wider.sum() * (i + 1 - start) > self.budget:
                batches.append(order[start:i])
                start, wider = i, widths[row]
            widest = wider
        batches.append(order[start:])
        return [batches[i] for i in rng.permutation(len(batches))]

    def rows(self, step):
        """Row numbers of a step."""
        epoch = int(np.searchsorted(self.ends, step, side="right")) - 1
        while epoch == len(self.ends) - 1:
            self.ends.append(self.ends[-1] + len(self.plan(epoch)))
            epoch += step >= self.ends[-1]
        return self.plan(epoch)[step - self.ends[epoch]]

    def share(self, step, rows):
        """The rows of the data set that stand for `rows` of 0 .. n_rows - 1 at a step, and how many
        of them count. At least two, the added ones without a loss: torch.compile makes code of its
        own for a size of 1, and there may be fewer rows than forward passes."""
        chosen = self.rows(step)
        first = len(chosen) * rows[0] // self.n_rows
        share = chosen[first : len(chosen) * (rows[-1] + 1) // self.n_rows]
        return np.append(share, np.repeat(chosen[:1], max(0, 2 - len(share)))), len(share)

    def batch(self, step, rows):
        rows, real = self.share(step, rows)
        src, tgt, loss_mask = self.pairs.batch(rows)
        loss_mask[real:] = False
        return src, tgt, loss_mask


def evenly(n, k):
    """k numbers of 0 .. n - 1, evenly spaced; all of them for k = 0 or k >= n."""
    return list(range(n)) if k == 0 or k >= n else np.linspace(0, n - 1, k).astype(int).tolist()
