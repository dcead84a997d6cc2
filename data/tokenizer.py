"""Text to ids and back: byte-pair encoding, trained here with rustbpe or GPT-2's; plain bytes; or
the tokenizer.json of a Hugging Face model. Needs no torch.

Ids: first the text's own, 0 .. n_text - 1, then 261 special ones that no text encodes to:
    pad, bos, eos, sep (between source and target in a decoder-only sequence), image (a placeholder
    for one token of a picture), and 256 sentinels, each for a hidden span.
A Hugging Face tokenizer keeps all its ids, its special ones included, as the first n_text. Its own
begin and end of sequence are bos and eos, so that a student ends its answers as its teacher does.
"""

import base64
import functools
import hashlib
import json
import os
import re

from lib.runs import write_json
from lib.settings import UserError, read_json

# GPT-4's rule for cutting text into words before merging, with numbers in groups of up to two
# digits instead of three: a small vocabulary has better uses for its slots. Trainer and encoder
# share it.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
    r"\s*[\r\n]|\s+(?!\S)|\s+"
)
# A pattern's work on a run without a cut grows with its square, and its memory may end: a million
# spaces are cut before they reach it.
LONG = re.compile(r"\s{512}|\S{4096}")
N_SENTINELS = 256
N_SPECIAL = 5 + N_SENTINELS
FILE = "tokenizer.json"


def pieces(text):
    """A text in parts, cut only inside very long runs."""
    ends = [match.end() for match in LONG.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]


class Tokenizer:
    """kind: "bytes"; "bpe", with `ranks`, each token's bytes in order of rank, and a `pattern`; or
    "hf", with `source`, the text of a Hugging Face tokenizer.json, the ids `bos` and `eos` of its
    ends, None where it has none, and `begin`: the id that its own call puts in front, -1 for
    none."""

    def __init__(self, kind, ranks=None, pattern=None, source=None, bos=None, eos=None, begin=None):
        self.kind, self.pattern, self.source = kind, pattern, source
        if kind == "bytes":
            ranks = [bytes([i]) for i in range(256)]
        self.ranks = token_bytes(self.foreign) if kind == "hf" else ranks
        self.n_text = len(self.ranks)
        self.pad, self.bos, self.eos, self.sep, self.image = range(self.n_text, self.n_text + 5)
        self.bos, self.eos = self.bos if bos is None else bos, self.eos if eos is None else eos
        self.begin = self.bos if begin is None else begin
        self.first_sentinel = self.n_text + 5
        self.vocab_size = self.n_text + N_SPECIAL

    def sentinel(self, i):
        """Id of the i-th sentinel."""
        return self.first_sentinel + i

    @functools.cached_property
    def merges(self):
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.ranks)}
        return tiktoken.Encoding(
            "nanoencdec", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    @functools.cached_property
    def foreign(self):
        from tokenizers import Tokenizer as Foreign

        tokenizer = Foreign.from_str(self.source)
        tokenizer.encode_special_tokens = True  # "</s>" in a text is four characters, not the end
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def leading_space(self):
        """Whether encoding puts a space before the text, as SentencePiece does, which decoding has
        to take away."""
        return self.kind == "hf" and self.bytes_of(self.encode("a")) == b" a"

    def encode(self, text):
        """Ids of a text. Never a special one, whatever the text says. A lone surrogate, which UTF-8
        cannot hold, becomes the replacement character."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        texts = [
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts
        ]
        if self.kind == "bytes":
            return [list(text.encode()) for text in texts]
        parts = [[text] if self.kind == "hf" else pieces(text) for text in texts]
        flat = [part for row in parts for part in row]
        if self.kind == "hf":
            made = self.foreign.encode_batch(flat, add_special_tokens=False)
            found = iter([encoding.ids for encoding in made])
        else:
            found = iter(self.merges.encode_ordinary_batch(flat, num_threads=os.cpu_count() or 1))
        return [[id for _ in row for id in next(found)] for row in parts]

    def bytes_of(self, ids):
        """The bytes that ids stand for; special ids stand for none."""
        return b"".join(self.ranks[i] for i in ids if 0 <= i < self.n_text)

    def decode(self, ids):
        """Text of ids; special ones are left out, bytes that are no UTF-8 become the replacement
        character."""
        text = self.bytes_of(ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.leading_space else text

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
        about = dict(format="nanoencdec", kind=self.kind, pattern=self.pattern, ranks=None)
        if self.kind == "bpe":
            about["ranks"] = [base64.b64encode(token).decode() for token in self.ranks]
        if self.kind == "hf":
            about |= dict(source=self.source, bos=self.bos, eos=self.eos, begin=self.begin)
        return about

    def hash(self):
        """Twelve hex digits that stand for everything about it: two tokenizers of one hash give the
        same ids."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:12]

    def save(self, folder):
        write_json(os.path.join(folder, FILE), self.to_dict())


def letters_of_bytes():
    """GPT-2's letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in printable]
    return {i: chr(i) for i in printable} | {i: chr(256 + n) for n, i in enumerate(others)}


def token_bytes(tokenizer):
    """The bytes of every id of a Hugging Face tokenizer; none for its special ids. Two spellings
    are in use: GPT-2's, a letter for each byte, and SentencePiece's, where a space is U+2581 and a
    lone byte is <0x0A>."""
    about = json.loads(tokenizer.to_str())
    added = {token["id"]: token for token in about["added_tokens"]}
    letters = {letter: byte for byte, letter in letters_of_bytes().items()}
    by_letters, ids = "ByteLevel" in json.dumps(about["decoder"]), tokenizer.get_vocab(True)
    size = max(tokenizer.get_vocab_size(True), 1 + max(ids.values()))
    if size > 2**20:
        raise ValueError(f"an id of {size:,}")
    found = [b""] * size
    for piece, i in ids.items():
        if i in added:
            found[i] = b"" if added[i]["special"] else added[i]["content"].encode()
        elif by_letters:
            found[i] = bytes(letters[letter] for letter in piece)
        elif len(piece) == 6 and piece.startswith("<0x"):
            found[i] = bytes([int(piece[3:5], 16)])
        else:
            found[i] = piece.replace("\u2581", " ").encode()
    return found


def told_beside(folder, key):
    """What the files beside a tokenizer.json say of a key; None where none of them does."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        path = os.path.join(folder, file)
        value = read_json(path).get(key) if os.path.exists(path) else None
        if value is not None:
            return value
    return None


def special_id(name, folder, tokenizer):
    """The id of a model's bos or eos, told by the files beside its tokenizer.json."""
    token, id = told_beside(folder, f"{name}_token"), told_beside(folder, f"{name}_token_id")
    if token is not None:
        return tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)
    return id[0] if isinstance(id, list) else id


def begin_of(folder, tokenizer, bos):
    """The id that a model's own tokenizer puts before a text, -1 for none: add_bos_token says so,
    or else what it does."""
    told = told_beside(folder, "add_bos_token")
    if told is None:
        ids = tokenizer.encode("a").ids
        return ids[0] if ids != tokenizer.encode("a", add_special_tokens=False).ids else -1
    return bos if told and bos is not None else -1


def load_tokenizer(name):
    """ "bytes", "gpt2", a tokenizer file, ours or Hugging Face's, or a folder that holds one."""
    if name == "bytes":
        return Tokenizer("bytes")
    if name == "gpt2":
        return load_gpt2()
    path = os.path.join(name, FILE) if os.path.isdir(name) else name
    if not os.path.exists(path):
        raise UserError(f"--tokenizer={name}: no such file; it takes bpe, gpt2, bytes or a {FILE}")
    about = read_json(path)
    try:
        if "model" in about and "added_tokens" in about:
            return load_foreign(path)
        tokenizer, words = load_own(about), told_beside(os.path.dirname(path), "vocab_size")
        if type(words) is int and tokenizer.vocab_size > words:
            raise ValueError(f"the model beside it has {words} words only")
        return tokenizer
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # `tokenizers` panics with a kind of its own
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path} cannot be used as a tokenizer ({reason})") from None


def load_own(about):
    """The Tokenizer of what to_dict gave. Like load_foreign it may raise anything."""
    if about["format"] != "nanoencdec" or about["kind"] not in ("bytes", "bpe", "hf"):
        raise ValueError("of an unknown kind")
    if about["kind"] == "bytes":
        return Tokenizer("bytes")
    if about["kind"] == "hf":
        ids = {key: about[key] for key in ("bos", "eos", "begin")}
        return checked(about["source"], ids)
    from tiktoken_ext.openai_public import r50k_pat_str

    if about["pattern"] not in (PATTERN, r50k_pat_str):
        raise ValueError("an unknown pattern")
    ranks = [base64.b64decode(code, validate=True) for code in about["ranks"]]
    if len(set(ranks)) != len(ranks) or not {bytes([i]) for i in range(256)} <= set(ranks):
        raise ValueError("a token twice, or a byte without one")
    return Tokenizer("bpe", ranks, about["pattern"])


def load_foreign(path):
    """The Tokenizer of a Hugging Face tokenizer.json."""
    from tokenizers import Tokenizer as Foreign

    with open(path, encoding="utf-8") as file:
        source = file.read()
    folder, foreign = os.path.dirname(path), Foreign.from_str(source)
    bos, eos = (special_id(name, folder, foreign) for name in ("bos", "eos"))
    return checked(source, dict(bos=bos, eos=eos, begin=begin_of(folder, foreign, bos)))


def checked(source, ids):
    """The Tokenizer of a tokenizer.json that nobody vouches for. A repeated group in a pattern may
    take exponential time, so there must be none; and texts must come back as they were."""
    for pattern in re.findall(r'"Regex":\s*("(?:[^"\\]|\\.)*")', source):
        # Without escaped characters and character classes, where a bracket is no group.
        groups = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "", json.loads(pattern))
        if re.search(r"\)[*+{]", groups):
            raise ValueError(f"the pattern {pattern} repeats a group and may never end")
    tokenizer = Tokenizer("hf", source=source, **ids)
    for id in ids.values():
        if id is not None and not (type(id) is int and -1 <= id < tokenizer.vocab_size):
            raise ValueError(f"{id!r} is no id")
    for text in ("a", "Two words\n\tof  Zürich, \u4e16: 3.14"):
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            raise ValueError(f"it changes texts: {text!r} comes back as {back!r}")
    return tokenizer


def load_gpt2():
    import tiktoken

    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises
        raise UserError(
            "--tokenizer=gpt2 could not be downloaded; set TIKTOKEN_CACHE_DIR to a folder that has "
            f"it, or use the default --tokenizer=bpe ({type(error).__name__})"
        ) from None
    ranks = sorted(gpt2._mergeable_ranks, key=gpt2._mergeable_ranks.get)
    return Tokenizer("bpe", ranks, gpt2._pat_str)


def train_tokenizer(texts, vocab_size):
    """A byte-pair vocabulary of `vocab_size` ids, the special ones included, from an iterable of
    texts."""
    import rustbpe

    n_text = vocab_size - N_SPECIAL
    if n_text < 256:
        raise UserError(
            f"--vocab_size={vocab_size} is too small: {N_SPECIAL} special ids and 256 bytes come "
            f"first; use at least {N_SPECIAL + 256}, or --tokenizer=bytes"
        )
    trainer, parts = rustbpe.Tokenizer(), (part for text in texts for part in pieces(text))
    trainer.train_from_iterator(parts, n_text, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return Tokenizer("bpe", [bytes(token) for token, _ in ranks], PATTERN)
