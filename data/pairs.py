"""Rows of source and target as batches: tokenized once, batched by length. Needs no torch."""
import functools
import threading

import numpy as np

from lib.settings import UserError
from data.objectives import join, pad_rows
from data.tokenizer import train_tokenizer

IMAGE = "<image>"  # in a text: here stands a picture


def train_pair_tokenizer(rows, vocab_size):
    """A vocabulary trained on the sources and targets of a task's training rows."""
    return train_tokenizer((text for row in rows for text in (row["source"], row["target"])), vocab_size)


def encode_sources(texts, tokenizer, n_tokens):
    """Ids of texts in which the k-th IMAGE stands for n_tokens[row][k] tokens of a picture."""
    parts = [text.split(IMAGE) for text in texts]
    ids = iter(tokenizer.encode_batch([part for row in parts for part in row]))
    return [[id for k in range(len(row)) for id in [*([tokenizer.image] * counts[k - 1] if k else []), *next(ids)]] for row, counts in zip(parts, n_tokens)]


class Pairs:
    """The rows of one split, as ids. A source ends with end-of-sequence, and so does a target. What is too long is cut
    off at its end and counted in `cut`: the source at src_len, the target at tgt_len.

    batch(rows) pads to the longest of these rows, no further. Decoder-only: source, separator and target in one sequence,
    with the loss on the target alone."""

    def __init__(self, rows, tokenizer, src_len, tgt_len, decoder_only):
        self.rows, self.tokenizer, self.decoder_only = rows, tokenizer, decoder_only
        sources, targets = self.encode(rows), tokenizer.encode_batch([row["target"] for row in rows])
        self.tgt_len = tgt_len
        self.room = room = src_len - 1 - decoder_only  # for the end and the separator
        if room < 1 or tgt_len < 2:
            raise UserError(f"--src_len={src_len} --tgt_len={tgt_len} leave no room for a source and a target")
        self.cut = dict(source=sum(len(ids) > room for ids in sources), target=sum(len(ids) > tgt_len - 1 for ids in targets))
        self.sources = [np.array([*ids[:room], tokenizer.eos]) for ids in sources]
        self.targets = [np.array([*ids, tokenizer.eos][:tgt_len]) for ids in targets]
        self.lengths = np.array([(len(s), len(t)) for s, t in zip(self.sources, self.targets)])  # (rows, 2)

    def __len__(self):
        return len(self.sources)

    def encode(self, rows):
        return self.tokenizer.encode_batch([row["source"] for row in rows])

    def shown(self, model, rows):
        """What the model is given beside the ids of these rows, by keyword: pictures, where there are any."""
        return {}

    def describe(self):
        src, tgt = self.lengths.mean(0)
        return (f"{len(self):,} rows of {src:.0f} source and {tgt:.0f} target tokens on average; {self.cut['source']:,} sources and "
                f"{self.cut['target']:,} targets were too long and lost their ends")

    def prompt(self, row):
        """What `generate` is given for a row."""
        ids = self.sources[row].tolist()
        return ids + [self.tokenizer.sep] if self.decoder_only else ids

    def batch(self, rows, sources_of=None, targets=None):
        """(src, src_mask, tgt, loss_mask) of these rows; with sources_of, each target beside the source of that row; with `targets`
        (lists of ids), those in the place of the rows' own."""
        sources = [self.sources[i] for i in (rows if sources_of is None else sources_of)]
        targets = targets or [self.targets[i] for i in rows]
        if self.decoder_only:
            return join(sources, targets, self.tokenizer)
        src, src_mask = pad_rows(sources, max(map(len, sources)), self.tokenizer.pad)
        return (src, src_mask, *pad_rows(targets, max(map(len, targets)), self.tokenizer.pad))

    def cost(self, rows):
        """Positions that a batch of these rows computes, padding included."""
        lengths = self.lengths[rows]
        widest = (lengths.sum(1) + 1).max() if self.decoder_only else lengths.max(0).sum()
        return int(widest) * len(rows)


class ByLength:
    """Batches of rows of like length, as a pure function of (seed, step): each epoch sorts the rows by length,
    a little blurred so that no two epochs have the same neighbours, cuts the line where a batch would exceed `budget`
    positions, and shuffles the batches. Every row comes once an epoch."""

    def __init__(self, pairs, budget, seed):
        self.pairs, self.budget, self.seed = pairs, budget, seed
        self.plan = functools.lru_cache(maxsize=2)(self.make_plan)
        self.ends = [0]  # steps before each epoch, as far as was asked
        self.lock = threading.Lock()  # the loop asks ahead, in a thread

    def make_plan(self, epoch):
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 1, 0, epoch]))  # no pretraining row's counter
        lengths = self.pairs.lengths
        src, tgt = (lengths * (1 + 0.1 * rng.random(lengths.shape))).T
        if self.pairs.decoder_only:
            order, widths = np.argsort(src + tgt, kind="stable"), lengths.sum(1, keepdims=True) + 1
        else:  # strata of like sources, as many as a stratum will have batches; within each by target, up and down in turn
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
        with self.lock:
            epoch = int(np.searchsorted(self.ends, step, side="right")) - 1
            while epoch == len(self.ends) - 1:
                self.ends.append(self.ends[-1] + len(self.plan(epoch)))
                epoch += step >= self.ends[-1]
            return self.plan(epoch)[step - self.ends[epoch]]

    def padding(self):
        """Share of the computed positions that are padding, over the first epoch."""
        computed = sum(self.pairs.cost(rows) for rows in self.plan(0))
        real = self.pairs.lengths.sum() + self.pairs.decoder_only * len(self.pairs)
        return 1 - real / computed
