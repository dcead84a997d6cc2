"""Corpora: any text -> documents -> token files on disk, memory-mapped. Needs no torch.

A corpus lies in CACHE/NAME-HASH/, where the hash is of all that decides its contents: the
tokenizer, manifest.json and, for each split, shards of about SHARD tokens, train-00000.bin,
train-00001.bin and so on. progress-SPLIT.json says how many documents the finished shards hold:
tokenizing can be stopped and goes on."""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import sysconfig

import numpy as np

from data.records import is_hub_id, read_text, split_files, stream
from data.tokenizer import load_tokenizer, train_tokenizer
from lib.runs import lock_folder, replacing, write_json
from lib.settings import UserError, progress, read_json

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.environ.get("NANOENCDEC_CACHE", os.path.join(HERE, "cache"))
SHARD = 2**26  # tokens
VAL_EVERY = 20  # where a data set brings no held-out split, every 20th document is held out ...
VAL_MOST = 2**22  # ... until there are this many tokens
FROM_HUB = 2**30  # tokens of a Hub data set, some of which have trillions
VOCAB_SAMPLE = 2**25  # characters that a vocabulary is trained on


# ----------------------------------------------------------------------------------------------
# Where documents come from


def python_files(full):
    """The Python source that this machine has: the standard library and, with `full`, the installed
    packages. Copies are dropped; one file in 20, by a hash of its text, is held out."""
    paths, seen, files = sysconfig.get_paths(), set(), []
    for root in [paths["stdlib"], *([paths["purelib"]] if full else [])]:
        for path in sorted(glob.glob(os.path.join(root, "**", "*.py"), recursive=True)):
            name = os.path.relpath(path, root)
            if "site-packages" in name or "dist-packages" in name:
                continue  # counted from their own root
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read().encode("utf-8", "replace")
            except (UnicodeDecodeError, OSError):
                continue
            digest = hashlib.sha256(text).hexdigest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                split = "val" if int(digest[:8], 16) % 20 == 0 else "train"
                about = dict(file=name, bytes=len(text), sha256=digest, split=split)
                files.append(about | dict(path=path))
    return files


def open_python(files, split):
    for about in files:
        if about["split"] == split:
            with open(about["path"], encoding="utf-8") as file:
                yield file.read()


def open_texts(data, kind, files=None):
    """Texts that are not empty: whole files of plain text, or the column `text` of a table."""
    if kind == "text":
        yield from filter(None, map(read_text, files))
        return
    for row in stream(kind, files, ["text"]):
        if "text" not in row:
            columns = ", ".join(map(str, row))
            raise UserError(f"--data={data} has no `text` but {columns}: a task takes --source_col")
        text = row["text"]
        if not isinstance(text, str | None):
            raise UserError(f"--data={data}: the column `text` holds {type(text).__name__}")
        if text:
            yield text


def held_out(documents, split):
    """One split of documents that come without one."""
    kept = 0
    for number, text in enumerate(documents):
        if split == "val" and kept >= VAL_MOST:
            return
        is_val = number % VAL_EVERY == VAL_EVERY - 1 and kept < VAL_MOST
        kept += is_val * len(text) // 3  # about what a token covers: counting would need tokens
        if is_val == (split == "val"):
            yield text


def last_tenth(documents, split):
    """One split of a single text: the first nine tenths of its characters, or the rest."""
    for text in documents:
        cut = int(len(text) * 0.9)
        yield text[:cut] if split == "train" else text[cut:]


def find_source(data):
    """--data -> (name, identity, open_split): `identity` is what decides the contents, and
    open_split("train" or "val") gives the texts."""
    if data in ("pycode", "pycode-full"):
        files = python_files(full=data == "pycode-full")
        identity = [[about["file"], about["sha256"], about["split"]] for about in files]
        return data, identity, lambda split: open_python(files, split)
    if os.path.exists(data):
        splits, kind = split_files(data)
        used = splits["train"] + splits["val"]
        facts = [[os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns] for f in used]
        name = os.path.basename(os.path.abspath(data))
        if splits["val"]:
            return name, [kind, facts], lambda split: open_texts(data, kind, splits[split])
        rule = last_tenth if kind == "text" and len(used) == 1 else held_out
        return name, [kind, facts], lambda split: rule(open_texts(data, kind, used), split)
    if not is_hub_id(data):
        raise UserError(f"--data={data}: no such file or folder, and no text or task here")
    return data.replace("/", "--"), [data], lambda split: held_out(open_texts(data, data), split)


# ----------------------------------------------------------------------------------------------
# Documents -> token files


def prepare(data, tokenizer="bpe", vocab_size=4096, log=print, most=None):
    """The Corpus of --data, tokenized on first use and from the cache after that. most: tokens of
    each split after which the rest is left out."""
    name, identity, open_split = find_source(data)
    ready = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
    most = FROM_HUB if most is None and not os.path.exists(data) and is_hub_id(data) else most
    words = vocab_size if ready is None else ready.hash()
    key = json.dumps([2, identity, words, *([most] if most else [])])
    folder = os.path.join(CACHE, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    os.makedirs(folder, exist_ok=True)
    # Another process may be tokenizing the same.
    with lock_folder(folder, wait=True) or contextlib.nullcontext():
        if not os.path.isfile(os.path.join(folder, "manifest.json")):
            tokenize(folder, (identity, open_split, most), ready, vocab_size, log)
    return Corpus(folder)


def tokenize(folder, source, tokenizer, vocab_size, log):
    identity, open_split, most = source
    log(f"tokenizing into {folder} (once)")
    path = os.path.join(folder, "tokenizer.json")
    if tokenizer is None and not os.path.exists(path):
        sample = progress(first(open_split("train"), VOCAB_SAMPLE), "training the vocabulary")
        tokenizer = train_tokenizer(sample, vocab_size)
    if not os.path.exists(path):
        tokenizer.save(folder)
    tokenizer = load_tokenizer(path)
    counts = {}
    for split in ("train", "val"):
        counts[split] = tokenize_split(folder, split, open_split, tokenizer, most or 2**62)
        if not counts[split]["tokens"]:
            raise UserError(
                f"the {split} split is empty: give {VAL_EVERY} texts, or files train and val"
            )
    manifest = dict(
        vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.hash(), splits=counts, source=identity
    )
    write_json(os.path.join(folder, "manifest.json"), manifest)


def first(texts, characters):
    """Texts until there are this many characters; the last one is cut."""
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def tokenize_split(folder, split, open_split, tokenizer, most):
    """Writes the shards of one split, going on behind the last finished one, until there are `most`
    tokens. Documents are separated by eos."""
    state_path = os.path.join(folder, f"progress-{split}.json")
    state = dict(shards=0, documents=0, tokens=0, bytes=0)
    if os.path.exists(state_path):
        state = read_json(state_path)
    documents = itertools.islice(open_split(split), state["documents"], None)
    unit = dict(unit=" tokens", unit_scale=True)
    bar = progress(what=f"tokenizing {split}", initial=state["tokens"], **unit)
    shard, size = [], 0
    while True:
        texts = list(itertools.islice(documents, 64 * (state["tokens"] + size < most)))
        for text, ids in zip(texts, tokenizer.encode_batch(texts)):
            shard.append(np.array([*ids, tokenizer.eos], dtype=token_type(tokenizer)))
            size += len(ids) + 1
            state["bytes"] += len(text.encode("utf-8", "replace"))
            bar.update(len(ids) + 1)
        state["documents"] += len(texts)
        if size >= SHARD or (size and not texts):
            name = os.path.join(folder, f"{split}-{state['shards']:05d}.bin")
            with replacing(name) as new:
                np.concatenate(shard).tofile(new)
            state.update(shards=state["shards"] + 1, tokens=state["tokens"] + size)
            write_json(state_path, state)
            shard, size = [], 0
        if not texts:
            bar.close()
            return state


def token_type(tokenizer):
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


# ----------------------------------------------------------------------------------------------
# Token files -> windows


class Corpus:
    """The token files of one corpus. `splits[name]` is a Tokens."""

    def __init__(self, folder):
        self.folder = folder
        self.manifest = read_json(os.path.join(folder, "manifest.json"), dict, 2**32)
        self.tokenizer = load_tokenizer(folder)
        self.splits = {}
        for split in ("train", "val"):
            paths = sorted(glob.glob(os.path.join(glob.escape(folder), f"{split}-*.bin")))
            shards = [np.memmap(path, token_type(self.tokenizer), "r") for path in paths]
            self.splits[split] = Tokens(shards)
        self.hash = hashlib.sha256(json.dumps(self.manifest).encode()).hexdigest()[:12]

    def describe(self):
        sizes = []
        for split, about in self.manifest["splits"].items():
            texts, megabytes = about["documents"], about["bytes"] / 1e6
            tokens = f"{split} {about['tokens']:,} tokens"
            sizes.append(f"{tokens} of {texts:,} texts ({megabytes:.1f} MB)")
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
            part = self.shards[shard][begin : begin + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)
