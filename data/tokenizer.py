"""Text to ids and back: byte-pair encoding (trained here with rustbpe, or GPT-2's), or plain bytes. Needs no torch.

Ids: first the text's own, 0 .. n_text - 1, then 261 special ones that no text encodes to:
    pad, bos, eos, sep (stands between source and target in a decoder-only sequence), image (a placeholder for one
    vision token), and 256 sentinels (each stands for a masked span).
"""
import base64
import functools
import hashlib
import json
import os

from data.cli import UserError
from data.runs import write_json

# GPT-4's rule for cutting text into words before merging, with numbers in groups of up to two digits instead of three:
# a small vocabulary has better uses for its slots. Trainer and encoder share this one string.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
N_SENTINELS = 256
N_SPECIAL = 5 + N_SENTINELS
FILE = "tokenizer.json"


class Tokenizer:
    """kind: "bytes" or "bpe", the latter with `ranks` (each token's bytes, in order of rank) and a `pattern`."""

    def __init__(self, kind, ranks=None, pattern=None):
        self.kind, self.pattern = kind, pattern
        self.ranks = [bytes([i]) for i in range(256)] if kind == "bytes" else ranks
        self.n_text = len(self.ranks)
        self.pad, self.bos, self.eos, self.sep, self.image = range(self.n_text, self.n_text + 5)
        self.first_sentinel = self.n_text + 5
        self.vocab_size = self.n_text + N_SPECIAL

    def sentinel(self, i):
        """Id of the i-th sentinel."""
        return self.first_sentinel + i

    @functools.cached_property
    def merges(self):
        import tiktoken
        ranks = {token: rank for rank, token in enumerate(self.ranks)}
        return tiktoken.Encoding("nanoencdec", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        """Ids of a text. Never a special one, whatever the text says. A lone surrogate, which UTF-8 cannot hold, becomes
        the replacement character."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        if self.kind == "bytes":
            return [list(text.encode()) for text in texts]
        return self.merges.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def bytes_of(self, ids):
        """The bytes that ids stand for; special ids stand for none."""
        return b"".join(self.ranks[i] for i in ids if 0 <= i < self.n_text)

    def decode(self, ids):
        """Text of ids; special ones are left out, bytes that are no UTF-8 become the replacement character."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def name_of(self, i):
        """How a special id is written for people; None for one that is text."""
        if i < self.n_text:
            return None
        names = ("<pad>", "<bos>", "<eos>", "<sep>", "<image>")
        return names[i - self.n_text] if i < self.first_sentinel else f"<{i - self.first_sentinel}>"

    def show(self, ids):
        """Text of ids with the special ones written out."""
        parts, run = [], []
        for i in [*ids, self.pad]:
            if i < self.n_text:
                run.append(i)
                continue
            parts += [self.decode(run), self.name_of(i)]
            run = []
        return "".join(parts[:-1])

    def to_dict(self):
        ranks = None if self.kind == "bytes" else [base64.b64encode(token).decode() for token in self.ranks]
        return {"format": "nanoencdec", "kind": self.kind, "pattern": self.pattern, "ranks": ranks}

    def hash(self):
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:12]

    def save(self, folder):
        write_json(os.path.join(folder, FILE), self.to_dict())


def load_tokenizer(name):
    """"bytes", "gpt2", a tokenizer file, or a folder that holds one."""
    if name == "bytes":
        return Tokenizer("bytes")
    if name == "gpt2":
        return load_gpt2()
    path = os.path.join(name, FILE) if os.path.isdir(name) else name
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
        if values.get("format") != "nanoencdec":
            raise ValueError("not written by this project")
        ranks = values["ranks"] and [base64.b64decode(token) for token in values["ranks"]]
        return Tokenizer(values["kind"], ranks, values["pattern"])
    except FileNotFoundError:
        raise UserError(f"--tokenizer={name}: no such file; it takes bpe, gpt2, bytes or the path of a {FILE}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no tokenizer file of this project ({error})") from None


def load_gpt2():
    import tiktoken
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises: requests' errors, OSError, a hash mismatch
        raise UserError("--tokenizer=gpt2 could not be downloaded; set TIKTOKEN_CACHE_DIR to a folder that has it, or use "
                        f"the default --tokenizer=bpe ({type(error).__name__})") from None
    ranks = sorted(gpt2._mergeable_ranks, key=gpt2._mergeable_ranks.get)
    return Tokenizer("bpe", ranks, gpt2._pat_str)


def train_tokenizer(texts, vocab_size):
    """A byte-pair vocabulary of `vocab_size` ids, the special ones included, from an iterable of texts."""
    import rustbpe
    n_text = vocab_size - N_SPECIAL
    if n_text < 257:
        raise UserError(f"--vocab_size={vocab_size} is too small: {N_SPECIAL} special ids and 256 bytes come first; use at "
                        f"least {N_SPECIAL + 257}, or --tokenizer=bytes")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, n_text, pattern=PATTERN)
    ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    return Tokenizer("bpe", ranks, PATTERN)
