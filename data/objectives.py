"""Pretraining objectives: rows of token ids in, batches out, without a loop over rows or tokens. Needs no torch.

A batch is (src, src_mask, tgt, loss_mask), numpy arrays (B, S) and (B, T); src and src_mask are None for a decoder-only
model, whose tgt is prompt and answer in one; src_mask is None where no row is padded. Targets are not shifted here.

A row is a pure function of (seed, step, its number in the global batch): `uniforms` is the only source of randomness.
"""
import numpy as np

from lib.settings import UserError
from data.tokenizer import N_SENTINELS

# UL2 (Tay et al., 2022, table 1 and section 3.1.2): (share of the text that is noise, mean length of a span). The
# eighth is the sequential denoiser: a prefix, then the rest of the window.
UL2 = [(0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.15, 64), (0.5, 64), "prefix"]


def uniforms(seed, step, rows, n):
    """(len(rows), n) numbers in [0, 1) from a counter-based generator: each row's are its own, whoever asks for them."""
    return np.stack([np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, row, step])).random(n) for row in rows])


def span_plan(src_len, tgt_len, noise=0.15, mean_span=3):
    """The longest text whose corrupted form fits src_len encoder and tgt_len decoder tokens (T5: Raffel et al., 2020,
    section 3.1.4). Returns (text, noise tokens, spans, source tokens, target tokens), all fixed, so that no row is padded:
    source = text - noise + spans + end, target = noise + spans + end. At 1024 and 256: (1137, 171, 57, 1024, 229)."""
    best = None
    for text in range(2, 2 * (src_len + tgt_len)):
        n_noise = min(max(round(text * noise), 1), text - 1)
        n_spans = min(max(round(n_noise / mean_span), 1), n_noise, text - n_noise, N_SENTINELS)
        plan = (text, n_noise, n_spans, text - n_noise + n_spans + 1, n_noise + n_spans + 1)
        if plan[3] <= src_len and plan[4] <= tgt_len:
            best = plan
    if best is None:
        raise UserError(f"--src_len={src_len} --tgt_len={tgt_len} is too short for span corruption: use at least 8 and 4")
    return best


def split_evenly(total, parts, u):
    """Cuts `total` into `parts` positive lengths, uniformly over all ways to do so; u (B, at least total - 1) in [0, 1).
    Returns (B, parts)."""
    cuts = np.sort(np.argsort(u[:, :total - 1], axis=1, kind="stable")[:, :parts - 1], axis=1) + 1
    ends = np.concatenate([cuts, np.full((len(u), 1), total)], axis=1)
    return np.diff(ends, axis=1, prepend=0)


def corrupt(ids, n_noise, n_spans, u, tokenizer):
    """Span corruption of ids (B, L): n_spans spans, n_noise tokens in all, each replaced by one sentinel in the source and
    spelled out behind that sentinel in the target; both end with end-of-sequence. u (B, L - 2) in [0, 1)."""
    B, L = ids.shape
    noise = split_evenly(n_noise, n_spans, u)
    text = split_evenly(L - n_noise, n_spans, u[:, n_noise - 1:])  # text comes first, noise last: T5's order
    pieces = np.stack([text, noise], axis=2).reshape(B, -1)  # (B, 2 n_spans) lengths
    starts = np.cumsum(pieces, axis=1) - pieces
    piece = np.zeros((B, L), dtype=np.int64)
    np.put_along_axis(piece, starts[:, 1:], 1, axis=1)
    piece = np.cumsum(piece, axis=1)  # which piece each token lies in
    first = np.diff(piece, axis=1, prepend=0) > 0
    is_noise, sentinel = piece % 2 == 1, tokenizer.sentinel(piece // 2)
    end = np.full((B, 1), tokenizer.eos)
    src = np.where(is_noise, sentinel, ids)[~is_noise | first].reshape(B, -1)
    # Every noise token gives one column, every first noise token one more before it.
    pairs = np.stack([sentinel, ids], axis=2)
    keep = np.stack([is_noise & first, is_noise], axis=2)
    tgt = pairs[keep].reshape(B, -1)
    return np.concatenate([src, end], axis=1), np.concatenate([tgt, end], axis=1)


def fill_spans(src, tgt, tokenizer):
    """Puts a target's spans back at the sentinels of its source. Returns the pieces of the text in order, (ids, filled)
    with filled True for what came from the target; a sentinel that the target does not have stays, as a piece of its own."""
    spans, current = {}, None
    for i in tgt:
        if i >= tokenizer.first_sentinel:
            current = spans.setdefault(i, [])
        elif i < tokenizer.n_text and current is not None:
            current.append(i)
    pieces = []
    for i in src:
        if i >= tokenizer.first_sentinel:
            pieces.append((spans.get(i, [i]), i in spans))
        elif i < tokenizer.n_text:
            if not pieces or pieces[-1][1] or pieces[-1][0][0] >= tokenizer.n_text:
                pieces.append(([], False))
            pieces[-1][0].append(i)
    return pieces


def pad_rows(rows, width, pad):
    """List of id arrays -> (ids (B, width), mask (B, width) True at real tokens)."""
    mask = np.arange(width)[None] < np.array([len(row) for row in rows])[:, None]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def join(sources, targets, tokenizer, width=None):
    """Decoder-only: source, separator, target in one sequence, padded on the right to `width` or to the longest; the loss
    is on the target alone. Returns a batch."""
    rows = [np.concatenate([src, [tokenizer.sep], tgt]) for src, tgt in zip(sources, targets)]
    ids, real = pad_rows(rows, width or max(map(len, rows)), tokenizer.pad)
    starts = np.array([len(src) + 1 for src in sources])[:, None]
    return None, None, ids, real & (np.arange(ids.shape[1])[None] >= starts)


class Objective:
    """How windows of text become batches. `window` is the text each row needs, in tokens."""

    def __init__(self, name, tokenizer, src_len, tgt_len, decoder_only, noise=0.15, mean_span=3):
        self.name, self.tokenizer, self.decoder_only = name, tokenizer, decoder_only
        self.src_len, self.tgt_len = src_len, tgt_len
        if name == "causal" and not decoder_only:
            raise UserError("--objective=causal has no source and is for --arch=dec; use span, prefix or ul2 with encdec")
        if name != "causal" and src_len < 1:
            raise UserError(f"--src_len={src_len}: --objective={name} needs a source")
        # A decoder-only sequence has a separator between source and target, so one token less of source.
        room = src_len - (decoder_only and name != "causal")
        self.plans = {"span": [(noise, mean_span)], "prefix": ["prefix"], "causal": [], "ul2": UL2}[name]
        self.plans = [plan if plan == "prefix" else span_plan(room, tgt_len, *plan) for plan in self.plans]
        prefix = room + tgt_len
        self.window = max([prefix if plan == "prefix" else plan[0] for plan in self.plans], default=src_len + tgt_len)
        self.n_random = max(self.window, 2)

    def describe(self):
        if self.name == "causal":
            return f"causal: rows of {self.window} tokens, every one a target"
        lines = {"span": "span corruption", "prefix": "prefix LM", "ul2": "UL2's mixture"}[self.name] + ": "
        if self.name == "span":
            text, noise, spans, src, tgt = self.plans[0]
            return lines + (f"{text} tokens of text give {src} of source (of {self.src_len}) and {tgt} of target (of "
                            f"{self.tgt_len}), {noise} of them text in {spans} spans; no padding")
        return lines + f"windows of {self.window} tokens; rows are padded to {self.src_len} of source and {self.tgt_len} of target"

    def batch(self, ids, u):
        """ids (B, window) of text and u (B, n_random) in [0, 1) -> (src, src_mask, tgt, loss_mask)."""
        if self.name == "causal":
            return None, None, ids, np.ones(ids.shape, dtype=bool)
        if self.name == "span":
            _, noise, spans, _, _ = self.plans[0]
            src, tgt = corrupt(ids, noise, spans, u[:, 1:], self.tokenizer)
            if self.decoder_only:
                return join(src, tgt, self.tokenizer)
            return src, None, tgt, np.ones(tgt.shape, dtype=bool)
        # Rows differ in length: make each, then pad to the settings' lengths, so that shapes stay fixed.
        chosen = (u[:, 0] * len(self.plans)).astype(int)
        pairs = [self.one(ids[b:b + 1], self.plans[k], u[b:b + 1, 1:]) for b, k in enumerate(chosen)]
        sources, targets = [src for src, _ in pairs], [tgt for _, tgt in pairs]
        if self.decoder_only:
            return join(sources, targets, self.tokenizer, self.src_len + self.tgt_len)
        return (*pad_rows(sources, self.src_len, self.tokenizer.pad), *pad_rows(targets, self.tgt_len, self.tokenizer.pad))

    def one(self, ids, plan, u):
        """One row's source and target under one plan."""
        if plan != "prefix":
            text, noise, spans, _, _ = plan
            src, tgt = corrupt(ids[:, :text], noise, spans, u[:, :text - 2], self.tokenizer)
            return src[0], tgt[0]
        cut = 1 + int(u[0, 0] * (ids.shape[1] - self.tgt_len))  # of 1 .. the source's room
        return ids[0, :cut], ids[0, cut:cut + self.tgt_len]
