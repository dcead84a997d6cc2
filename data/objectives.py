"""Pretraining objectives: windows of token ids in, sources and targets out. Needs no torch.

To add one, write a class like those below and put it into OBJECTIVES. It has
    help             what it asks of the model, in one line
    window, n_random tokens and random numbers that a row needs, set by __init__
    rows(ids, u)     sources and targets of ids (B, window), by chance u (B, n_random) in [0, 1)
    prompt(...)      how sample.py asks a model that was trained with it
A target that should end must end with tokenizer.eos. sample.py prints the prompt and then the
answer; its text_of prints holes and tasks otherwise.

A batch is (src, tgt, loss_mask), numpy arrays (B, S), (B, T), (B, T): ids padded on the right, and
True where a target counts. A decoder-only model's tgt is source, separator and target in one; its
src is None, or for a prefix LM a mask of the inputs that are prompt. Targets are not shifted here.

A row is a pure function of seed, step and its number in the global batch: `uniforms` is the only
source of chance.
"""

import numpy as np

from data.tokenizer import N_SENTINELS, Tokenizer
from lib.settings import UserError

MASK = "<mask>"  # a hole in a prompt


def uniforms(seed, step, rows, n):
    """(len(rows), n) numbers in [0, 1) from a counter-based generator: a row's are its own."""
    made = [np.random.Philox(key=seed, counter=[0, 0, row, step]) for row in rows]
    return np.stack([np.random.Generator(one).random(n) for one in made])


def span_plan(src_len, tgt_len, noise, mean_span):
    """The longest text whose corrupted form fits src_len and tgt_len (T5: Raffel et al., 2020,
    section 3.1.4). Returns (text, noise tokens, spans), all fixed, so that no row is padded:
    source = text - noise + spans + end, target = noise + spans + end."""
    best = None
    for text in range(2, 2 * (src_len + tgt_len)):
        n_noise = min(max(round(text * noise), 1), text - 1)
        n_spans = min(max(round(n_noise / mean_span), 1), n_noise, text - n_noise, N_SENTINELS)
        if text - n_noise + n_spans + 1 <= src_len and n_noise + n_spans + 1 <= tgt_len:
            best = text, n_noise, n_spans
    if best is None:
        raise UserError(
            f"--src_len={src_len} --tgt_len={tgt_len} is too short for span corruption: use at "
            "least 8 and 4"
        )
    return best


def split_evenly(total, parts, u):
    """Cuts `total` into `parts` positive lengths (B, parts), uniformly over all ways to do so; u
    (B, at least total - 1)."""
    order = np.argsort(u[:, : total - 1], axis=1, kind="stable")
    cuts = np.sort(order[:, : parts - 1], axis=1) + 1
    ends = np.concatenate([cuts, np.full((len(u), 1), total)], axis=1)
    return np.diff(ends, axis=1, prepend=0)


def corrupt(ids, n_noise, n_spans, u, tokenizer):
    """Span corruption of ids (B, L): n_spans spans, n_noise tokens in all, each replaced by one
    sentinel in the source and spelled out behind that sentinel in the target. u (B, L - 2)."""
    B, L = ids.shape
    noise = split_evenly(n_noise, n_spans, u)
    text = split_evenly(L - n_noise, n_spans, u[:, n_noise - 1 :])
    pieces = np.stack([text, noise], axis=2).reshape(B, -1)  # (B, 2 n_spans) lengths, text first
    starts = np.cumsum(pieces, axis=1) - pieces
    piece = np.zeros((B, L), dtype=np.int64)
    np.put_along_axis(piece, starts[:, 1:], 1, axis=1)
    piece = np.cumsum(piece, axis=1)  # which piece each token lies in
    first = np.diff(piece, axis=1, prepend=0) > 0
    is_noise, sentinel = piece % 2 == 1, tokenizer.sentinel(piece // 2)
    end = np.full((B, 1), tokenizer.eos)
    src = np.where(is_noise, sentinel, ids)[~is_noise | first].reshape(B, -1)
    # Every noise token gives one column, every first noise token one more before it.
    both = np.stack([sentinel, ids], axis=2)
    tgt = both[np.stack([is_noise & first, is_noise], axis=2)].reshape(B, -1)
    return np.concatenate([src, end], axis=1), np.concatenate([tgt, end], axis=1)


class Span:
    help = "span corruption: tells what stood in the holes of its source"

    def __init__(self, tokenizer, src_len, tgt_len, noise=0.15, mean_span=3):
        self.tokenizer = tokenizer
        self.plan = span_plan(src_len, tgt_len, noise, mean_span)
        self.window = self.n_random = self.plan[0]

    def rows(self, ids, u):
        text, n_noise, n_spans = self.plan
        return corrupt(ids[:, :text], n_noise, n_spans, u[:, : text - 2], self.tokenizer)

    @staticmethod
    def prompt(text, tokenizer):
        """Every <mask> is a hole; a text without one gets one at its end."""
        parts = (text if MASK in text else text + MASK).split(MASK)
        if len(parts) - 1 > N_SENTINELS:
            raise UserError(f"the prompt has {len(parts) - 1} {MASK}, at most {N_SENTINELS} differ")
        ids = tokenizer.encode(parts[0])
        for hole, part in enumerate(parts[1:]):
            ids += [tokenizer.sentinel(hole), *tokenizer.encode(part)]
        return [*ids, tokenizer.eos]


class Prefix:
    help = "prefix LM: goes on where its source ends"

    def __init__(self, tokenizer, src_len, tgt_len):
        self.window, self.n_random, self.tgt_len = src_len + tgt_len, 1, tgt_len

    def rows(self, ids, u):
        cuts = 1 + (u[:, 0] * (ids.shape[1] - self.tgt_len)).astype(int)  # 1 .. src_len
        sources = [row[:cut] for row, cut in zip(ids, cuts)]
        return sources, [row[cut : cut + self.tgt_len] for row, cut in zip(ids, cuts)]

    @staticmethod
    def prompt(text, tokenizer):
        return tokenizer.encode(text)


class Causal:
    help = "the next token, everywhere; for --arch=dec"

    def __init__(self, tokenizer, src_len, tgt_len):
        self.window, self.n_random = src_len + tgt_len, 1

    def rows(self, ids, u):
        return None, ids

    prompt = Prefix.prompt


class UL2:
    """Tay et al., 2022, table 1 and section 3.1.2: seven denoisers, drawn for each row."""

    help = "UL2's mixture of span corruptions, short and long, and prefix LM"
    denoisers = [(0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.15, 64), (0.5, 64)]

    def __init__(self, tokenizer, src_len, tgt_len):
        self.parts = [Span(tokenizer, src_len, tgt_len, *denoiser) for denoiser in self.denoisers]
        self.parts.append(Prefix(tokenizer, src_len, tgt_len))
        self.window = max(part.window for part in self.parts)
        self.n_random = 1 + self.window

    def rows(self, ids, u):
        chosen = (u[:, 0] * len(self.parts)).astype(int)
        made = [self.parts[k].rows(ids[b : b + 1], u[b : b + 1, 1:]) for b, k in enumerate(chosen)]
        return [source[0] for source, _ in made], [target[0] for _, target in made]

    @staticmethod
    def prompt(text, tokenizer):
        return (Span if MASK in text else Prefix).prompt(text, tokenizer)


class Seq2seq:
    """Rows of a task, which data/sets.py batches; here is how it is asked."""

    help = "a task: answers its source"

    @staticmethod
    def prompt(text, tokenizer):
        return [*tokenizer.encode(text), tokenizer.eos]


OBJECTIVES = dict(span=Span, prefix=Prefix, causal=Causal, ul2=UL2, seq2seq=Seq2seq)


def examples():
    """For --help: each objective with a row as it is really made, of single letters."""
    tokenizer = Tokenizer("bytes")
    ids = np.frombuffer(b"The encoder reads its source, the decoder writes.", np.uint8)[None]
    lines = ["objectives, with a row as each makes it:"]
    for name, kind in OBJECTIVES.items():
        lines.append(f"    {name:8} {getattr(kind, 'help', '')}")
        if name in ("span", "prefix"):
            made = kind(tokenizer, 40, 16)
            u = uniforms(4, 0, [0], made.n_random)
            source, target = (tokenizer.show(row[0]) for row in made.rows(ids[:, : made.window], u))
            lines.append(f"{'':13}{source} -> {target}")
    return "\n".join(lines)


def make_prompt(name, text, tokenizer, decoder_only):
    """Ids that a model trained with this objective is asked with: the encoder's source or,
    decoder-only, the beginning of the sequence."""
    if name not in OBJECTIVES:
        raise UserError(f"a run with the objective {name!r} has no prompts"[:200])
    ids = OBJECTIVES[name].prompt(text, tokenizer)
    if not ids:
        raise UserError("the prompt is empty")
    return ids + [tokenizer.sep] * (decoder_only and name != "causal")


def fill_spans(src, tgt, tokenizer):
    """Puts a target's spans back at the sentinels of its source -> pieces of the text in order,
    (ids, filled): filled is True for what came from the target. A sentinel that the target does
    not have stays, as a piece of its own."""
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
            pieces.append(([i], False))
    return pieces


def pad_rows(rows, width, pad):
    """List of id arrays -> ids (B, width), and a mask, True at real tokens."""
    mask = np.arange(width)[None] < np.array([len(row) for row in rows])[:, None]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def count_tokens(batch, pad):
    """Real tokens of a batch, source and target."""
    parts = [ids for ids in batch[:2] if ids is not None and ids.dtype != bool]
    return sum(int((ids != pad).sum()) for ids in parts)


def make_batch(sources, targets, tokenizer, decoder_only, widths=None):
    """(src, tgt, loss_mask) of lists of ids, padded to the longest, or to `widths` of source and
    target. sources None: every token is a target. decoder_only: True, or "prefix"."""
    src_width, tgt_width = widths or (0, 0)
    if sources is None:
        tgt, loss_mask = pad_rows(targets, max(tgt_width, *map(len, targets)), tokenizer.pad)
        return None, tgt, loss_mask
    if decoder_only:
        sep = [tokenizer.sep]
        rows = [np.concatenate([src, sep, tgt]) for src, tgt in zip(sources, targets)]
        width = max(src_width + tgt_width, *map(len, rows))
        ids, real = pad_rows(rows, width, tokenizer.pad)
        starts = np.array([len(src) + 1 for src in sources])[:, None]
        # Inputs are shifted right: bos, source and separator are the prompt.
        prompt = np.arange(width)[None] <= starts if decoder_only == "prefix" else None
        return prompt, ids, real & (np.arange(width)[None] >= starts)
    src, _ = pad_rows(sources, max(src_width, *map(len, sources)), tokenizer.pad)
    tgt, loss_mask = pad_rows(targets, max(tgt_width, *map(len, targets)), tokenizer.pad)
    return src, tgt, loss_mask
