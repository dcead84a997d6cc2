"""Corpora: any text -> documents -> token files on disk, memory-mapped. Needs no torch.

A corpus lies in CACHE/<name>-<hash of all that decides its contents>/ as tokenizer.json, manifest.json and, for each split
(train, val), shards of about SHARD tokens: train-00000.bin, train-00001.bin ... Each shard is written under another
name first, and progress.json says how many documents the finished ones hold: tokenizing can be stopped and goes on.
"""
import glob
import hashlib
import itertools
import json
import os
import re
import sysconfig

import numpy as np
from tqdm import tqdm

from lib.settings import UserError
from data.decontaminate import Contamination, clean
from lib.runs import write_json
from data.tokenizer import load_tokenizer, train_tokenizer

CACHE = os.environ.get("NANOENCDEC_CACHE", os.path.join(os.path.dirname(os.path.abspath(__file__)), "cache"))
SHARD = 2 ** 26        # tokens
VAL_EVERY = 20         # where a data set brings no held-out split, every 20th document is held out ...
VAL_MOST = 2 ** 22     # ... until there are this many tokens
VOCAB_SAMPLE = 2 ** 25 # characters that a vocabulary is trained on
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # anything else is plain text


# ---------------------------------------------------------------------------------------------------------------------
# Where documents come from. A source is (name, identity, open_split): `identity` is what decides the contents (it is
# hashed), open_split("train" or "val") an iterator over texts.

def python_files(full):
    """The Python source this machine has: the standard library, with `full` also the installed packages. Duplicates are
    dropped, one file in 20 (by a hash of its text, so that a copy never stands on both sides) is held out."""
    roots = [sysconfig.get_paths()["stdlib"]] + ([sysconfig.get_paths()["purelib"]] if full else [])
    seen, files = set(), []
    for root in roots:
        for path in sorted(glob.glob(os.path.join(root, "**", "*.py"), recursive=True)):
            name = os.path.relpath(path, root)
            if "site-packages" in name or "dist-packages" in name:
                continue  # counted from their own root
            try:
                with open(path, encoding="utf-8") as f:
                    text = f.read()
            except (UnicodeDecodeError, OSError):
                continue
            digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                files.append(dict(file=name, bytes=len(text.encode("utf-8", "replace")), sha256=digest,
                                  split="val" if int(digest[:8], 16) % 20 == 0 else "train", path=path))
    return files


def open_python(files, split):
    for file in files:
        if file["split"] == split:
            with open(file["path"], encoding="utf-8") as f:
                yield f.read()


def split_files(path):
    """(split -> files of a path, their kind): splits as the files' names tell, train, valid or val, test (not used here). A file
    whose name tells nothing is training data."""
    found = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)) if os.path.isdir(path) else [path]
    files = [f for f in found if os.path.isfile(f) and not os.path.basename(f).startswith(".")]
    splits = {"train": [], "val": [], "test": []}
    for file in files:
        name = os.path.basename(file).lower()
        words = set(re.split(r"[^a-z]+", name))
        split = "val" if words & {"val", "valid", "validation", "dev"} else "test" if "test" in words else "train"
        splits["train" if len(files) == 1 else split].append(file)
    if not splits["train"]:
        raise UserError(f"--data={path}: no training files there")
    if not any(os.path.getsize(f) for f in splits["train"]):
        raise UserError(f"--data={path}: the file is empty" if len(files) == 1 else f"--data={path}: all files are empty")
    kinds = {LOADERS.get(os.path.splitext(f)[1].lower(), "text") for f in files}
    if len(kinds) > 1:
        raise UserError(f"--data={path}: files of several kinds ({', '.join(sorted(kinds))}); keep one kind in the folder")
    return splits, kinds.pop()


def open_rows(kind, files, **options):
    """Rows (dicts) of local files or a Hub data set, streamed through the `datasets` library; `options` go to its reader."""
    import datasets
    datasets.disable_progress_bars()
    try:
        if isinstance(files, str):  # a Hub id and a split
            rows = datasets.load_dataset(kind, split=files, streaming=True)
        else:
            more = dict(sample_by="document") if kind == "text" else {}
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **more, **options)
        yield from rows
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(f"--data={kind} is neither a built-in name (pycode, pycode-full) nor a path here, and as a Hub data "
                        f"set it could not be reached ({type(error).__name__}); to use a local copy, pass its path") from None
    except Exception as error:  # the readers behind `datasets` raise their own kinds for broken files
        first = str(error.__cause__ or error).splitlines()
        raise UserError(f"reading {files} failed: {first[0] if first else type(error).__name__}") from None


def open_texts(kind, files, column):
    """One column of those rows: texts that are not empty."""
    for row in open_rows(kind, files):
        if column not in row:
            raise UserError(f"there is no column {column!r} in {kind if isinstance(files, str) else files[0]}; it has "
                            f"{', '.join(row) or 'none'}: choose with --text_col")
        if not isinstance(row[column], str | None):
            raise UserError(f"column {column!r} holds {type(row[column]).__name__}, not text: choose with --text_col")
        if row[column]:
            yield row[column]


def held_out(documents, split):
    """One split of documents that come without one."""
    kept = 0
    for number, text in enumerate(documents):
        if split == "val" and kept >= VAL_MOST:
            return
        is_val = number % VAL_EVERY == VAL_EVERY - 1 and kept < VAL_MOST
        kept += is_val * len(text) // 3  # about what a token covers: exact counting would need the tokenizer here
        if is_val == (split == "val"):
            yield text


def last_tenth(documents, split):
    """One split of a single text: the first nine tenths of its characters, or the rest."""
    for text in documents:
        cut = int(len(text) * 0.9)
        yield text[:cut] if split == "train" else text[cut:]


def find_source(data, column):
    """--data -> (name, identity, open_split). Raises UserError for a path that is not there."""
    if data in ("pycode", "pycode-full"):
        files = python_files(full=data == "pycode-full")
        identity = [{key: file[key] for key in ("file", "bytes", "sha256", "split")} for file in files]
        return data, identity, lambda split: open_python(files, split)
    if os.path.exists(data):
        splits, kind = split_files(data)
        used = splits["train"] + splits["val"]
        identity = [kind, column, [[os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns] for f in used]]
        name = os.path.basename(os.path.abspath(data))
        column = "text" if kind == "text" else column
        if splits["val"]:
            return name, identity, lambda split: open_texts(kind, splits[split], column)
        rule = last_tenth if kind == "text" and len(used) == 1 else held_out
        return name, identity, lambda split: rule(open_texts(kind, splits["train"], column), split)
    if data.startswith((".", "/", "~")) or os.path.splitext(data)[1] in (*LOADERS, ".txt") or data.count("/") != 1:
        raise UserError(f"--data={data}: no such file or folder, and no built-in name (pycode, pycode-full)")
    return data.replace("/", "--"), [data, column], lambda split: held_out(open_texts(data, "train", column), split)


# ---------------------------------------------------------------------------------------------------------------------
# Documents -> token files

def prepare(data, tokenizer="bpe", vocab_size=4096, text_col="text", max_tokens=0, avoid=(), log=print):
    """The Corpus of --data, tokenized on first use and from the cache after that. max_tokens: of training text; 0 is all.
    avoid: evaluation texts that no training document may contain."""
    name, identity, open_split = find_source(data, text_col)
    ready = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
    key = json.dumps([1, identity, f"bpe-{vocab_size}" if ready is None else ready.hash(), max_tokens, *avoid])
    folder = os.path.join(CACHE, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if avoid:
        contamination, open_all = Contamination(avoid), open_split

        def open_split(split):
            return clean(open_all(split), contamination, folder, log) if split == "train" else open_all(split)
    if not os.path.isfile(os.path.join(folder, "manifest.json")):
        os.makedirs(folder, exist_ok=True)
        tokenize(folder, identity, open_split, ready, vocab_size, max_tokens, log)
    return Corpus(folder)


def tokenize(folder, identity, open_split, tokenizer, vocab_size, max_tokens, log):
    log(f"tokenizing into {folder} (once)")
    path = os.path.join(folder, "tokenizer.json")
    if tokenizer is None and not os.path.exists(path):
        sample = itertools.takewhile(Budget(VOCAB_SAMPLE), open_split("train"))
        tokenizer = train_tokenizer(tqdm(sample, desc="training the vocabulary", unit=" documents"), vocab_size)
    if not os.path.exists(path):
        tokenizer.save(folder)
    tokenizer = load_tokenizer(path)
    counts = {}
    for split in ("train", "val"):
        counts[split] = tokenize_split(folder, split, open_split, tokenizer, max_tokens if split == "train" else 0)
        if not counts[split]["tokens"]:
            raise UserError(f"the {split} split of the data is empty: give more text, or files named train and val")
    manifest = dict(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.hash(), splits=counts, source=identity)
    write_json(os.path.join(folder, "manifest.json"), manifest)


def tokenize_split(folder, split, open_split, tokenizer, most):
    """Writes the shards of one split, going on behind the last finished one. Documents are separated by eos."""
    state_path = os.path.join(folder, f"progress-{split}.json")
    state = dict(shards=0, documents=0, tokens=0, bytes=0)
    if os.path.exists(state_path):
        with open(state_path, encoding="utf-8") as f:
            state = json.load(f)
    documents = itertools.islice(open_split(split), state["documents"], None)
    bar = tqdm(desc=f"tokenizing {split}", unit=" tokens", unit_scale=True, initial=state["tokens"])
    shard, size = [], 0

    def finish():
        nonlocal shard, size
        name = os.path.join(folder, f"{split}-{state['shards']:05d}.bin")
        with open(name + ".new", "wb") as f:
            np.concatenate(shard).tofile(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(name + ".new", name)
        state.update(shards=state["shards"] + 1, tokens=state["tokens"] + size)
        write_json(state_path, state)
        shard, size = [], 0

    while (not most or state["tokens"] + size < most) and (texts := list(itertools.islice(documents, 64))):
        for text, ids in zip(texts, tokenizer.encode_batch(texts)):
            shard.append(np.array([*ids, tokenizer.eos], dtype=token_type(tokenizer)))
            size += len(ids) + 1
            state["bytes"] += len(text.encode("utf-8", "replace"))
            bar.update(len(ids) + 1)
        state["documents"] += len(texts)
        if size >= SHARD:
            finish()
    if size:
        finish()
    bar.close()
    return state


def token_type(tokenizer):
    return np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32


class Budget:
    """True until the texts it has seen exceed `characters`."""

    def __init__(self, characters):
        self.left = characters

    def __call__(self, text):
        self.left -= len(text)
        return self.left > -len(text)


# ---------------------------------------------------------------------------------------------------------------------
# Token files -> windows

class Corpus:
    """The token files of one corpus. `splits[name]` is a Tokens."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as f:
            self.manifest = json.load(f)
        self.tokenizer = load_tokenizer(folder)
        dtype = token_type(self.tokenizer)
        self.splits = {split: Tokens([np.memmap(path, dtype, "r") for path in
                                      sorted(glob.glob(os.path.join(glob.escape(folder), f"{split}-*.bin")))])
                       for split in ("train", "val")}
        self.hash = hashlib.sha256(json.dumps(self.manifest).encode()).hexdigest()[:12]

    def describe(self):
        splits = self.manifest["splits"]
        sizes = [f"{split} {splits[split]['tokens']:,} tokens of {splits[split]['documents']:,} documents "
                 f"({splits[split]['bytes'] / 1e6:.1f} MB)" for split in ("train", "val")]
        return f"{self.folder}: {', '.join(sizes)}; vocabulary {self.tokenizer.vocab_size}"


class Tokens:
    """A sequence of tokens that lies in several memory-mapped shards."""

    def __init__(self, shards):
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self):
        return int(self.ends[-1])

    def windows(self, starts, length):
        """(len(starts), length) of int64; windows may cross from one shard into the next."""
        return np.stack([self.window(int(start), length) for start in starts])

    def window(self, start, length):
        parts, shard = [], int(np.searchsorted(self.ends, start, side="right"))
        while length > 0:
            begin = start - int(self.ends[shard] - len(self.shards[shard]))
            part = self.shards[shard][begin:begin + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)
