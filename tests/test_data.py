"""Tokenizer, objectives and corpora: properties, on arbitrary text and at many lengths."""

import json
import multiprocessing
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest

import data.corpus as C
import data.objectives as O
import data.sets
from data.tokenizer import N_SENTINELS, N_SPECIAL, Tokenizer, load_tokenizer, train_tokenizer
from lib.settings import UserError
from train import Settings

BYTES = Tokenizer("bytes")
TEXTS = ["def f(x):\n    return x + 1  # größer, 更大 🙂\n" * 20, "the quick brown fox " * 30]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, N_SPECIAL + 300)


def random_texts(n):
    """Arbitrary Unicode of all planes, with control characters and line ends of every kind."""
    rng = random.Random(0)
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(n):
        letters = [chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(0, 40))]
        yield "".join(letters) + rng.choice(["", "\r\n", "\u2028", "  \t"])


# --- tokenizer


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_round_trip(kind, bpe, tmp_path):
    tokenizer = BYTES if kind == "bytes" else bpe
    texts = [*random_texts(300), "", "<pad><eos><0><mask><|endoftext|>", "a" * 9000, " " * 1000000]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert tokenizer.decode(ids) == text and tokenizer.bytes_of(ids) == text.encode()
        assert all(i < tokenizer.n_text for i in ids)  # text never becomes a special token
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # half a character
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode(texts[5]) == tokenizer.encode(texts[5]) and again.hash() == tokenizer.hash()
    special = [again.pad, again.bos, again.eos, again.sep, again.image]
    special += [again.sentinel(i) for i in range(N_SENTINELS)]
    assert special == list(range(again.n_text, again.vocab_size))
    assert again.decode([*special, *again.encode("x")]) == "x"
    assert len({again.name_of(i) for i in special}) == N_SPECIAL


def foreign_bpe(texts, adds=False):
    """A byte-pair tokenizer in Hugging Face's form; adds: it puts <s> in front."""
    from tokenizers import Tokenizer as Foreign
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    foreign = Foreign(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    more = dict(special_tokens=["<s>", "</s>"], initial_alphabet=letters)
    foreign.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, **more))
    if adds:
        ends = [("<s>", foreign.token_to_id("<s>"))]
        foreign.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=ends)
    return foreign


def test_tokenizers_of_strangers(tmp_path, bpe):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    good, theirs = json.loads(path.read_text()), json.loads(foreign_bpe(TEXTS).to_str())
    bad = ["", "[]", '{"format": "other"}', "[" * 200000]
    changes = [dict(pattern="(a+)+$"), dict(pattern="("), dict(ranks=["!"]), dict(ranks=5)]
    changes += [dict(ranks=good["ranks"][9:])]
    bad += [json.dumps(good | change) for change in changes]
    hf = dict(good, kind="hf", ranks=None, bos=0, eos=1, begin=-1, source=json.dumps(theirs))
    bad += [json.dumps(hf | change) for change in (dict(source="{}"), dict(eos=10**9))]
    for pattern in ("(?:a|aa)*b", "[(]([^)]\\)|a){9,}"):
        split = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
        bad.append(json.dumps(theirs | dict(pre_tokenizer=split)))
        bad.append(json.dumps(hf | dict(source=bad[-1])))
    for text in [*bad, json.dumps(theirs | dict(normalizer=dict(type="Lowercase")))]:
        path.write_text(text)
        with pytest.raises(UserError, match="tokenizer.json"):
            load_tokenizer(str(tmp_path))
    split = dict(split, pattern=dict(Regex=r"[(+)*]+|\)+|'(?:s|t)?|\p{L}{1,9}"))
    steps = dict(type="Sequence", pretokenizers=[split, theirs["pre_tokenizer"]])
    for usable in (hf, theirs | dict(pre_tokenizer=steps)):
        path.write_text(json.dumps(usable))
        assert load_tokenizer(str(path)).n_text == 300
    assert bpe.vocab_size == N_SPECIAL + 300 and len(bpe.encode("return")) < 6
    with pytest.raises(UserError, match="vocab_size"):
        train_tokenizer(["x"], 300)


@pytest.mark.parametrize("adds", [True, False])
def test_an_imported_tokenizer_begins_as_its_own_call_does(tmp_path, adds):
    transformers = pytest.importorskip("transformers")
    foreign, ends = foreign_bpe(TEXTS, adds), dict(bos_token="<s>", eos_token="</s>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=foreign, **ends)
    fast.save_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("a fox").input_ids
    assert [ours.begin] * (ours.begin >= 0) + ours.encode("a fox") == theirs
    assert (ours.begin >= 0) == adds and ours.bos == foreign.token_to_id("<s>")
    ours.save(tmp_path / "..")
    assert load_tokenizer(str(tmp_path / "..")).begin == ours.begin


# --- objectives


@pytest.mark.parametrize("src_len, tgt_len", [(8, 4), (100, 7), (64, 500), (1024, 256)])
@pytest.mark.parametrize("noise, mean_span", O.UL2.denoisers)
def test_corruption_is_undone_by_its_target(src_len, tgt_len, noise, mean_span):
    text, n_noise, n_spans = O.span_plan(src_len, tgt_len, noise, mean_span)
    ids = np.random.default_rng(0).integers(0, BYTES.n_text, (5, text))
    src, tgt = O.corrupt(ids, n_noise, n_spans, O.uniforms(0, 0, range(5), text), BYTES)
    assert src.shape[1] <= src_len and tgt.shape[1] <= tgt_len and 1 <= n_spans <= N_SENTINELS
    for row in range(5):
        pieces = O.fill_spans(src[row], tgt[row], BYTES)
        assert [i for piece, _ in pieces for i in piece] == ids[row].tolist()
        spans = [len(piece) for piece, filled in pieces if filled]
        assert len(spans) == n_spans and sum(spans) == n_noise and min(spans) >= 1
        sentinels = [BYTES.sentinel(i) for i in range(n_spans)]
        for side in (src, tgt):  # fixed ids, in order
            assert [i for i in side[row] if i >= BYTES.first_sentinel] == sentinels
            assert side[row, -1] == BYTES.eos


def test_noise_falls_evenly_and_span_lengths_vary():
    assert O.span_plan(1024, 256, 0.15, 3) == (1137, 171, 57)  # as T5's own arithmetic gives
    objective = O.Span(BYTES, 128, 32)
    text, n_noise, _ = objective.plan
    ids = np.zeros((2000, text), dtype=np.int64) + np.arange(text) % BYTES.n_text
    _, targets = objective.rows(ids, O.uniforms(0, 0, range(2000), objective.n_random))
    hidden, lengths = np.zeros(BYTES.n_text), []
    for row in targets:
        np.add.at(hidden, row[row < BYTES.n_text], 1)
        lengths += np.diff(np.flatnonzero(row >= BYTES.n_text)).tolist()
    share = hidden[:text] / 2000
    assert np.abs(share[20:-20] - n_noise / text).max() < 0.05 and len(set(lengths)) > 5


@pytest.mark.parametrize("dec", [False, True])
@pytest.mark.parametrize("name", ["span", "prefix", "ul2", "causal"])
def test_rows_are_pure_and_fit(name, dec):
    objective = O.OBJECTIVES[name](BYTES, 64 - dec, 24)
    ids = np.random.default_rng(1).integers(0, BYTES.n_text, (40, objective.window))

    def make(rows, seed=7, step=3):
        made = objective.rows(ids[rows], O.uniforms(seed, step, rows, objective.n_random))
        return O.make_batch(*made, BYTES, dec, (64, 24))

    whole = make(list(range(40)))
    for rows in ([0, 1], [39], [5, 30, 6]):  # whoever makes a row, in whatever company
        for a, b in zip(whole, make(rows)):
            assert (a is None) == (b is None) and (a is None or np.array_equal(a[rows], b))
    src, tgt, loss_mask = whole
    assert (src is None) == (dec or name == "causal") and tgt.shape == loss_mask.shape
    assert src is None or (src.shape[1] <= 64 and tgt.shape[1] <= 24)
    assert tgt.shape[1] <= 88 and not loss_mask[tgt == BYTES.pad].any() and loss_mask.any(1).all()
    if dec and name != "causal":  # the loss is on what comes behind the separator
        at = (tgt == BYTES.sep).argmax(1)
        assert (loss_mask.argmax(1) == at + 1).all()
    other = O.uniforms(8, 3, range(40), 9), O.uniforms(7, 4, range(40), 9)
    assert not any(np.array_equal(O.uniforms(7, 3, range(40), 9), u) for u in other)


def test_prefix_rows_are_the_text_cut_in_two_and_ul2_draws_all_of_its_denoisers():
    objective, kinds, cuts = O.OBJECTIVES["ul2"](BYTES, 128, 64), {}, set()
    ids = np.random.default_rng(2).integers(0, BYTES.n_text, (700, objective.window))
    sources, targets = objective.rows(ids, O.uniforms(0, 0, range(700), objective.n_random))
    for row, source, target in zip(ids, sources, targets):
        spans = sum(i >= BYTES.first_sentinel for i in source)
        text = [i for piece, _ in O.fill_spans(source, target, BYTES) for i in piece]
        text = text if spans else [*source, *target]
        cuts |= set() if spans else {len(source)}
        assert text == row[: len(text)].tolist()
        kinds[spans, len(target)] = kinds.get((spans, len(target)), 0) + 1
    prefix = sum(n for (spans, _), n in kinds.items() if spans == 0)
    assert len(kinds) == 7 and abs(prefix / 700 - 1 / 7) < 0.05 and len(cuts) > 30


def test_prompts():
    assert O.make_prompt("span", "a<mask>b", BYTES, False) == [97, BYTES.sentinel(0), 98, BYTES.eos]
    assert O.make_prompt("ul2", "ab", BYTES, True) == [97, 98, BYTES.sep]
    for text, says in (("", "empty"), ("<mask>" * 300, "300 <mask>")):
        with pytest.raises(UserError, match=says):
            O.make_prompt("causal" if not text else "span", text, BYTES, True)
    with pytest.raises(UserError, match="too short"):
        O.Span(BYTES, 2, 2)


# --- corpora


def quiet(data, tokenizer, vocab_size=4096, most=None):
    return C.prepare(data, tokenizer, vocab_size, str, most)


def all_text(corpus, split):
    tokens = corpus.splits[split]
    return corpus.tokenizer.show(tokens.window(0, len(tokens)).tolist())


def test_one_text_is_split_by_position_and_keeps_its_carriage_returns(tmp_path):
    text = "".join(chr(97 + i % 26) + "\r\n" * (i % 50 == 0) for i in range(1000)) + "é\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus, cut = quiet("a.txt", "bytes"), int(len(text) * 0.9)
    assert all_text(corpus, "train") == text[:cut] + "<eos>"
    assert all_text(corpus, "val") == text[cut:] + "<eos>"
    assert corpus.manifest["splits"]["val"]["bytes"] == len(text[cut:].encode())


def test_sets_read_all_of_their_own_text(monkeypatch):
    # Every token is the number of its place.
    ranges = dict(train=np.arange(4000), val=np.arange(5000, 5500))
    parts = {split: C.Tokens([places]) for split, places in ranges.items()}
    corpus = SimpleNamespace(hash="", tokenizer=BYTES, describe=str, splits=parts)
    monkeypatch.setattr(data.sets, "prepare", lambda *_: corpus)
    cfg = Settings(arch="dec", objective="causal", src_len=24, tgt_len=8)
    train_set, valid_set = data.sets.open_data(cfg, str, 8)
    drawn = np.concatenate([train_set.batch(step, range(8))[1] for step in range(50)])
    assert 0 <= drawn.min() < 200 and 3800 < drawn.max() < 4000
    few = next(valid_set.held_out(4, 4))[1]
    assert (few[0, 0], few[-1, -1]) == (5000, 5499) and (np.diff(few[:, 0]) > 100).all()
    scored = [tgt[loss_mask] for _, tgt, loss_mask in valid_set.held_out(0, 8)]
    assert np.concatenate(scored).tolist() == [*range(5001, 5500)]  # every token once
    cfg.arch, cfg.objective, cfg.src_len, cfg.tgt_len = "encdec", "span", 96, 48
    spans, rows = data.sets.TextSet(corpus, "val", cfg), np.arange(4)
    u = O.uniforms(cfg.seed, 0, rows, spans.objective.n_random)  # a training row's
    starts = np.linspace(0, 500 - spans.objective.window, 4).astype(int)
    assert not np.array_equal(spans.make(starts, u)[1], next(spans.held_out(4, 4))[1])


def write_table(path, columns):
    import pandas

    frame, kind = pandas.DataFrame(columns), path.suffix[1:]
    if kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_tables_hold_out_every_twentieth_row_and_lose_none(tmp_path, kind):
    texts = [f'row {i}, "quoted"\nand a second line ✓' for i in range(56)]
    texts += ["NA", "None", "null", "42"]
    path = tmp_path / f"d[1].{kind}"  # a name, no pattern
    write_table(path, dict(id=range(60), text=texts, url="x"))
    corpus = quiet(path.name, "bytes")
    assert all_text(corpus, "val") == "".join(texts[i] + "<eos>" for i in (19, 39, 59))
    rest = [text for i, text in enumerate(texts) if i % 20 != 19]
    assert all_text(corpus, "train") == "".join(text + "<eos>" for text in rest)
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match="no `text` but body"):
        quiet("other.jsonl", "bytes")


def test_a_folder_tells_its_splits_by_names_of_files_and_folders(tmp_path):
    for name in ("train-1", "train-2", "val/one", "test/train"):
        os.makedirs(tmp_path / "d" / os.path.dirname(name), exist_ok=True)
        (tmp_path / "d" / f"{name}.txt").write_text(name)
    corpus = quiet("d", "bytes")
    assert all_text(corpus, "train") == "train-1<eos>train-2<eos>"
    assert all_text(corpus, "val") == "val/one<eos>"
    (tmp_path / "d" / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match="one kind of files"):
        quiet("d", "bytes")


def test_tokenizing_goes_on_where_it_stopped_and_shards_read_as_one(tmp_path, monkeypatch):
    rng = random.Random(1)
    rows = [dict(text="".join(rng.choices("abc ", k=rng.randint(1, 80)))) for _ in range(900)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = quiet("d.jsonl", "bytes").splits["train"]
    monkeypatch.setattr(C, "SHARD", 3000)
    monkeypatch.setattr(C, "CACHE", str(tmp_path / "second"))
    encode, left = Tokenizer.encode_batch, [5]

    def fails(self, batch):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(Tokenizer, "encode_batch", fails)
    with pytest.raises(KeyboardInterrupt) as _stopped:  # which must not hold the lock
        quiet("d.jsonl", "bytes")
    assert list((tmp_path / "second").rglob("train-00000.bin"))
    assert not list((tmp_path / "second").rglob("manifest.json"))
    tokens, one = quiet("d.jsonl", "bytes").splits["train"], whole.window(0, len(whole))
    assert len(tokens.shards) > 5 and np.array_equal(tokens.window(0, len(tokens)), one)
    some = quiet("d.jsonl", "bytes", 4096, 10000).splits["train"]
    assert 10000 <= len(some) < 10000 + 64 * 81
    for start in (0, 2990, len(tokens) - 7000):  # windows across the ends of shards
        assert np.array_equal(tokens.windows([start], 7000)[0], one[start : start + 7000])


def fill_cache(folder):
    C.CACHE = folder
    quiet("words.txt", "bpe", 700)


def test_two_processes_fill_one_cache(tmp_path, text_file):
    fresh = multiprocessing.get_context("spawn")
    workers = [fresh.Process(target=fill_cache, args=[str(tmp_path)]) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(tmp_path.glob("words.txt-*"))) == 1


BROKEN = [
    ("d.jsonl", b"", "empty"),
    ("d.jsonl", b"{not json}\n", "could not be read"),
    ("d.txt", b"\xff", "UTF-8"),
    ("e/.x", b"", "no train"),
]


@pytest.mark.parametrize("name, content, says", BROKEN)
def test_broken_files(tmp_path, name, content, says):
    (tmp_path / "e").mkdir()
    os.mkfifo(tmp_path / "e" / "pipe.txt")  # nobody writes into it
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        quiet(name.split("/")[0], "bytes")
