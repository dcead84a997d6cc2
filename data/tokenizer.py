"""Text to ids and back: byte-pair encoding (trained here with rustbpe, or GPT-2's), plain bytes, or the tokenizer.json of a
Hugging Face model. Needs no torch.

Ids: first the text's own, 0 .. n_text - 1, then 261 special ones that no text encodes to:
    pad, bos, eos, sep (stands between source and target in a decoder-only sequence), image (a placeholder for one
    vision token), and 256 sentinels (each stands for a masked span).
A Hugging Face tokenizer keeps all its ids, its special ones included, as the first n_text; its own begin and end of
sequence are bos and eos, so that a student ends its answers as its teacher does.
"""
import base64
import functools
import hashlib
import json
import os

from lib.settings import UserError
from lib.runs import write_json

# GPT-4's rule for cutting text into words before merging, with numbers in groups of up to two digits instead of three:
# a small vocabulary has better uses for its slots. Trainer and encoder share this one string.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
N_SENTINELS = 256
N_SPECIAL = 5 + N_SENTINELS
FILE = "tokenizer.json"


class Tokenizer:
    """kind: "bytes"; "bpe", with `ranks` (each token's bytes, in order of rank) and a `pattern`; or "hf", with `source`, the
    text of a Hugging Face tokenizer.json, and the ids of its bos and eos (None: it has none)."""

    def __init__(self, kind, ranks=None, pattern=None, source=None, bos=None, eos=None):
        self.kind, self.pattern, self.source = kind, pattern, source
        self.ranks = [bytes([i]) for i in range(256)] if kind == "bytes" else token_bytes(self.foreign) if kind == "hf" else ranks
        self.n_text = len(self.ranks)
        self.pad, self.bos, self.eos, self.sep, self.image = range(self.n_text, self.n_text + 5)
        self.bos, self.eos = self.bos if bos is None else bos, self.eos if eos is None else eos
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
        """Whether encoding puts a space before the text, as SentencePiece does, which decoding has to take away."""
        return self.kind == "hf" and self.bytes_of(self.encode("a")) == b" a"

    def encode(self, text):
        """Ids of a text. Never a special one, whatever the text says. A lone surrogate, which UTF-8 cannot hold, becomes
        the replacement character."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        if self.kind == "bytes":
            return [list(text.encode()) for text in texts]
        if self.kind == "hf":
            return [encoding.ids for encoding in self.foreign.encode_batch(texts, add_special_tokens=False)]
        return self.merges.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def bytes_of(self, ids):
        """The bytes that ids stand for; special ids stand for none."""
        return b"".join(self.ranks[i] for i in ids if 0 <= i < self.n_text)

    def decode(self, ids):
        """Text of ids; special ones are left out, bytes that are no UTF-8 become the replacement character."""
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
        ranks = None if self.kind == "bytes" else [base64.b64encode(token).decode() for token in self.ranks]
        foreign = {"source": self.source, "bos": self.bos, "eos": self.eos} if self.kind == "hf" else {}
        return {"format": "nanoencdec", "kind": self.kind, "pattern": self.pattern, "ranks": None if foreign else ranks, **foreign}

    def hash(self):
        """Twelve hex digits that stand for everything about it: two tokenizers of one hash give the same ids."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:12]

    def save(self, folder):
        write_json(os.path.join(folder, FILE), self.to_dict())


def letters_of_bytes():
    """GPT-2's letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {i: chr(i) for i in printable} | {i: chr(256 + n) for n, i in enumerate(i for i in range(256) if i not in printable)}


def token_bytes(tokenizer):
    """The bytes of every id of a Hugging Face tokenizer; none for its special ids. Two spellings are in use: GPT-2's, a letter for
    each byte, and SentencePiece's, where a space is U+2581 and a lone byte is <0x0A>."""
    about = json.loads(tokenizer.to_str())
    added = {token["id"]: token for token in about["added_tokens"]}
    letters = {letter: byte for byte, letter in letters_of_bytes().items()}
    by_letters = "ByteLevel" in json.dumps(about["decoder"])
    ids, size = tokenizer.get_vocab(with_added_tokens=True), tokenizer.get_vocab_size(with_added_tokens=True)
    found = [b""] * max(size, 1 + max(ids.values()))
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


def merges_of(ranks):
    """The pairs that make each token of a byte-pair vocabulary, in order of rank: what GPT-2's way of writing one down has in place of ranks."""
    rank_of, merges = {token: rank for rank, token in enumerate(ranks)}, []
    for rank, token in enumerate(ranks):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # as encoding goes, with the tokens that come before this one
            best = min(range(len(parts) - 1), key=lambda i: rank_of.get(parts[i] + parts[i + 1], rank))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def to_foreign(tokenizer):
    """(tokenizer.json, tokenizer_config.json) by which the libraries `tokenizers` and `transformers` give the same ids, as texts. Begin of sequence comes before every text."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Foreign
    if tokenizer.kind == "hf":
        foreign = Foreign.from_str(tokenizer.source)
    else:
        letters = letters_of_bytes()
        spelled = ["".join(letters[byte] for byte in token) for token in tokenizer.ranks]
        merges = [tuple("".join(letters[byte] for byte in part) for part in pair) for pair in merges_of(tokenizer.ranks)]
        foreign = Foreign(models.BPE({piece: i for i, piece in enumerate(spelled)}, merges))
        cut = [pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated")] if tokenizer.pattern else []
        foreign.pre_tokenizer = pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        foreign.decoder = decoders.ByteLevel()
    for i in range(tokenizer.n_text, tokenizer.vocab_size):
        name = tokenizer.name_of(i)
        foreign.add_special_tokens([AddedToken(name if foreign.token_to_id(name) is None else f"<nanoencdec {name[1:]}", special=True, normalized=False)])
    piece_of = foreign.id_to_token
    if foreign.get_vocab_size() != tokenizer.vocab_size or foreign.token_to_id(piece_of(tokenizer.sentinel(N_SENTINELS - 1))) != tokenizer.vocab_size - 1:
        raise UserError("the special ids of this tokenizer cannot be added to its Hugging Face form: its own ids have holes")
    bos = piece_of(tokenizer.bos)
    foreign.post_processor = processors.TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, tokenizer.bos)])
    ends = {f"{name}_token": piece_of(getattr(tokenizer, name)) for name in ("bos", "eos", "pad", "sep")}
    about = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, model_max_length=10 ** 9, **ends)
    return foreign.to_str(), json.dumps(about, indent=1)


def special_id(name, folder, tokenizer):
    """The id of a model's bos or eos: told by the files beside its tokenizer.json; None if by none of them."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        try:
            with open(os.path.join(folder, file), encoding="utf-8") as f:
                about = json.load(f)
        except (OSError, ValueError):
            continue
        token, id = about.get(f"{name}_token"), about.get(f"{name}_token_id")
        if token is not None:
            return tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)
        if id is not None:
            return id[0] if isinstance(id, list) else id
    return None


def load_foreign(path, source):
    """The Tokenizer of a Hugging Face tokenizer.json at `path`."""
    from tokenizers import Tokenizer as Foreign
    try:
        tokenizer = Foreign.from_str(source)
        ends = [special_id(name, os.path.dirname(path), tokenizer) for name in ("bos", "eos")]
        tokenizer = Tokenizer("hf", source=source, bos=ends[0], eos=ends[1])
    except Exception as error:  # `tokenizers` raises plain Exceptions; KeyError: letters that are no bytes
        raise UserError(f"{path} cannot be used as a tokenizer ({type(error).__name__}: {error})") from None
    for text in ("a", "Two words\n\tof  Zürich, \u4e16: 3.14"):
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise UserError(f"{path} changes texts ({text!r} comes back as {tokenizer.decode(tokenizer.encode(text))!r}): only byte-level and "
                            "byte-fallback vocabularies can be used")
    return tokenizer


def load_tokenizer(name):
    """"bytes", "gpt2", a tokenizer file (ours or Hugging Face's tokenizer.json), or a folder that holds one."""
    if name == "bytes":
        return Tokenizer("bytes")
    if name == "gpt2":
        return load_gpt2()
    path = os.path.join(name, FILE) if os.path.isdir(name) else name
    try:
        with open(path, encoding="utf-8") as f:
            source = f.read()
        values = json.loads(source)
        if "model" in values and "added_tokens" in values:
            return load_foreign(path, source)
        if values.get("format") != "nanoencdec":
            raise ValueError("neither written by this project nor by Hugging Face")
        if values["kind"] == "hf":
            return Tokenizer("hf", source=values["source"], bos=values["bos"], eos=values["eos"])
        ranks = values["ranks"] and [base64.b64decode(token) for token in values["ranks"]]
        return Tokenizer(values["kind"], ranks, values["pattern"])
    except FileNotFoundError:
        raise UserError(f"--tokenizer={name}: no such file; it takes bpe, gpt2, bytes or the path of a {FILE}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no tokenizer file ({error})") from None


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
