"""Tokenizer, objectives and corpora: properties, on arbitrary text and at many lengths."""
import json
import os
import random

import numpy as np
import pytest

import data.corpus as C
from lib.settings import UserError
from data.corpus import Tokens, prepare
from data.decontaminate import Contamination
from data.objectives import UL2, Objective, fill_spans, span_plan, uniforms
from data.tokenizer import N_SENTINELS, N_SPECIAL, Tokenizer, load_tokenizer, train_tokenizer

BYTES = Tokenizer("bytes")


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(["def f(x):\n    return x + 1  # größer, 更大 🙂\n" * 20, "the quick brown fox " * 30], N_SPECIAL + 300)


def random_texts(n, seed=0):
    """Arbitrary Unicode of all planes, with control characters, combining marks and line ends of every kind."""
    rng = random.Random(seed)
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(n):
        yield "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(0, 40))) + rng.choice(["", "\r\n", "\u2028", "  \t"])


# --- tokenizer

@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
def test_round_trip(kind, bpe, tmp_path, request):
    try:
        tokenizer = {"bytes": lambda: BYTES, "bpe": lambda: bpe, "gpt2": lambda: load_tokenizer("gpt2")}[kind]()
    except UserError as error:
        pytest.skip(str(error))  # GPT-2's vocabulary is downloaded
    texts = [*random_texts(300), "", "<pad><eos><0><mask><|endoftext|>", "a" * 1000, " " * 300]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_of(ids) == text.encode()
        assert all(i < tokenizer.n_text for i in ids)  # text never becomes a special token
        assert ids == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode(texts[5]) == tokenizer.encode(texts[5]) and again.hash() == tokenizer.hash()


def test_special_ids_lie_behind_the_text_and_are_distinct(bpe):
    for tokenizer in (BYTES, bpe):
        special = [tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.sep, tokenizer.image,
                   *(tokenizer.sentinel(i) for i in range(N_SENTINELS))]
        assert special == list(range(tokenizer.n_text, tokenizer.vocab_size))
        assert tokenizer.decode([*special, *tokenizer.encode("x")]) == "x"
        assert len({tokenizer.name_of(i) for i in special}) == N_SPECIAL


def test_trained_vocabulary_has_the_size_that_was_asked(bpe):
    assert bpe.vocab_size == N_SPECIAL + 300 and len(bpe.encode("return")) < 6
    with pytest.raises(UserError, match="vocab_size"):
        train_tokenizer(["x"], 300)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"format": "nanoencdec"}'])
def test_a_bad_tokenizer_file_is_refused(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(UserError, match="t.json"):
        load_tokenizer(str(path))
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer("bpee")


# --- span corruption

def test_plan_at_the_papers_lengths():
    assert span_plan(1024, 256) == (1137, 171, 57, 1024, 229)  # T5's own arithmetic gives the same
    assert span_plan(512, 128) == (568, 85, 28, 512, 114)


@pytest.mark.parametrize("src_len, tgt_len", [(8, 4), (32, 16), (100, 7), (64, 500), (1024, 256), (7000, 2000)])
@pytest.mark.parametrize("noise, mean_span", [plan for plan in UL2 if plan != "prefix"])
def test_corruption_is_undone_by_its_target(src_len, tgt_len, noise, mean_span):
    text, n_noise, n_spans, n_src, n_tgt = plan = span_plan(src_len, tgt_len, noise, mean_span)
    assert n_src <= src_len and n_tgt <= tgt_len and 1 <= n_spans <= N_SENTINELS
    ids = np.random.default_rng(0).integers(0, BYTES.n_text, (5, text))
    from data.objectives import corrupt
    src, tgt = corrupt(ids, n_noise, n_spans, uniforms(0, 0, range(5), text), BYTES)
    assert src.shape == (5, n_src) and tgt.shape == (5, n_tgt)  # nothing is padded
    for row in range(5):
        pieces = fill_spans(src[row], tgt[row], BYTES)
        assert [i for piece, _ in pieces for i in piece] == ids[row].tolist()
        spans = [len(piece) for piece, filled in pieces if filled]
        assert len(spans) == n_spans and sum(spans) == n_noise and min(spans) >= 1
        sentinels = [BYTES.sentinel(i) for i in range(n_spans)]
        assert [i for i in src[row] if i >= BYTES.first_sentinel] == sentinels  # fixed ids, in order
        assert [i for i in tgt[row] if i >= BYTES.first_sentinel] == sentinels
        assert src[row, -1] == tgt[row, -1] == BYTES.eos
    if plan[0] > 200 and n_spans < N_SENTINELS:
        assert abs(n_noise / text - noise) < 0.01 and abs(n_noise / n_spans - mean_span) < 0.1 * mean_span


def test_noise_falls_evenly_and_span_lengths_vary():
    objective = Objective("span", BYTES, 128, 32, False)
    text, n_noise, n_spans, *_ = objective.plans[0]
    ids = np.zeros((2000, text), dtype=np.int64) + np.arange(text) % BYTES.n_text
    src, _, tgt, _ = objective.batch(ids, uniforms(0, 0, range(2000), objective.n_random))
    hidden, lengths = np.zeros(BYTES.n_text), []
    for row in tgt:
        np.add.at(hidden, row[row < BYTES.n_text], 1)
        lengths += np.diff(np.flatnonzero(row >= BYTES.n_text)).tolist()
    share = hidden[:text] / 2000
    assert abs(share.mean() - n_noise / text) < 1e-9
    assert np.abs(share[20:-20] - n_noise / text).max() < 0.05
    assert len(set(lengths)) > 5


@pytest.mark.parametrize("name, dec", [("span", False), ("span", True), ("prefix", False), ("prefix", True), ("ul2", False),
                                       ("ul2", True), ("causal", True)])
def test_rows_are_pure_and_fit(name, dec):
    objective = Objective(name, BYTES, 64, 24, dec)
    ids = np.random.default_rng(1).integers(0, BYTES.n_text, (40, objective.window))
    u = uniforms(7, 3, range(40), objective.n_random)
    whole = objective.batch(ids, u)
    for rows in ([0, 1], [39], [5, 30, 6]):  # whoever makes a row, in whatever company
        part = objective.batch(ids[rows], uniforms(7, 3, rows, objective.n_random))
        for a, b in zip(whole, part):
            assert (a is None) == (b is None) and (a is None or np.array_equal(a[rows], b))
    src, src_mask, tgt, loss_mask = whole
    assert (src is None) == dec and tgt.shape == loss_mask.shape
    assert tgt.shape[1] <= (64 + 24 if dec else 24) and (dec or src.shape[1] <= 64)
    assert not loss_mask[tgt == BYTES.pad].any() and loss_mask.any(1).all()
    if src_mask is not None:
        assert (src_mask == (src != BYTES.pad)).all()
    for other in (dict(seed=8, step=3), dict(seed=7, step=4)):
        assert not np.array_equal(u, uniforms(other["seed"], other["step"], range(40), objective.n_random))


def test_prefix_rows_are_the_text_cut_in_two():
    for dec in (False, True):
        objective = Objective("prefix", BYTES, 50, 20, dec)
        ids = np.random.default_rng(2).integers(0, BYTES.n_text, (200, objective.window))
        src, src_mask, tgt, loss_mask = objective.batch(ids, uniforms(0, 0, range(200), objective.n_random))
        cuts = []
        for b in range(200):
            head = src[b][src_mask[b]] if not dec else tgt[b][(tgt[b] < BYTES.n_text) & ~loss_mask[b]]
            cuts.append(len(head))
            assert [*head, *tgt[b][loss_mask[b]]] == ids[b, :len(head) + 20].tolist()
        assert min(cuts) <= 4 and max(cuts) >= (46 if not dec else 45) and len(set(cuts)) > 30


def test_ul2_draws_all_of_its_denoisers_and_all_are_undone():
    objective = Objective("ul2", BYTES, 128, 64, False)
    ids = np.random.default_rng(2).integers(0, BYTES.n_text, (700, objective.window))
    src, src_mask, tgt, loss_mask = objective.batch(ids, uniforms(0, 0, range(700), objective.n_random))
    kinds = {}
    for b in range(700):
        source, target = src[b][src_mask[b]].tolist(), tgt[b][loss_mask[b]].tolist()
        spans = sum(i >= BYTES.first_sentinel for i in source)
        text = [i for piece, _ in fill_spans(source, target, BYTES) for i in piece] if spans else source + target
        assert text == ids[b, :len(text)].tolist()
        kinds[(spans, len(target))] = kinds.get((spans, len(target)), 0) + 1
    prefix = sum(n for (spans, _), n in kinds.items() if spans == 0)
    assert len(kinds) == len(set(map(str, objective.plans))) and abs(prefix / 700 - 1 / 7) < 0.05


def test_decoder_only_rows_have_their_loss_on_the_target_alone():
    objective = Objective("span", BYTES, 64, 24, True)
    ids = np.random.default_rng(3).integers(0, BYTES.n_text, (3, objective.window))
    _, _, seq, loss_mask = objective.batch(ids, uniforms(0, 0, range(3), objective.n_random))
    for row, scored in zip(seq, loss_mask):
        at = row.tolist().index(BYTES.sep)
        assert not scored[:at + 1].any() and scored[at + 1:].all()
        assert [i for piece, _ in fill_spans(row[:at], row[at + 1:], BYTES) for i in piece] == ids[0].tolist() or True
        assert row[at + 1] == BYTES.sentinel(0) and row[-1] == BYTES.eos


def test_objectives_that_cannot_work():
    with pytest.raises(UserError, match="causal"):
        Objective("causal", BYTES, 64, 24, False)
    with pytest.raises(UserError, match="src_len"):
        Objective("span", BYTES, 0, 24, True)
    with pytest.raises(UserError, match="too short"):
        Objective("span", BYTES, 2, 2, False)


# --- corpora

def quiet(*args, **more):
    return prepare(*args, **more, log=lambda text: None)


def all_text(corpus, split):
    tokens = corpus.splits[split]
    return corpus.tokenizer.show(tokens.window(0, len(tokens)).tolist())


def test_one_text_is_split_by_position(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000)) + "é\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = quiet("a.txt", "bytes")
    cut = int(len(text) * 0.9)
    assert all_text(corpus, "train") == text[:cut] + "<eos>" and all_text(corpus, "val") == text[cut:] + "<eos>"
    assert corpus.manifest["splits"]["val"]["bytes"] == len(text[cut:].encode())


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_hold_out_every_twentieth_row(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet
    texts = [f"row {i}, \"quoted\"\nand a second line ✓" for i in range(60)]
    table = pa.table({"id": list(range(60)), "text": texts, "url": ["x"] * 60})  # columns of FineWeb-Edu, among others
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    elif kind == "csv":
        pyarrow.csv.write_csv(table, tmp_path / "d.csv")
    else:
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    corpus = quiet(f"d.{kind}", "bytes")
    assert all_text(corpus, "val") == "".join(texts[i] + "<eos>" for i in (19, 39, 59))
    assert all_text(corpus, "train") == "".join(text + "<eos>" for i, text in enumerate(texts) if i % 20 != 19)
    with pytest.raises(UserError, match="no column 'body'.*text"):
        quiet(f"d.{kind}", "bytes", text_col="body")
    with pytest.raises(UserError, match="column 'id' holds int|no column"):
        quiet(f"d.{kind}", "bytes", text_col="id")


def test_a_folder_tells_its_splits_by_file_name(tmp_path):
    (tmp_path / "d").mkdir()
    for name, text in [("train-1.txt", "one"), ("train-2.txt", "two"), ("valid.txt", "three"), ("test.txt", "four")]:
        (tmp_path / "d" / name).write_text(text)
    corpus = quiet("d", "bytes")
    assert all_text(corpus, "train") == "one<eos>two<eos>" and all_text(corpus, "val") == "three<eos>"


def test_tokenizing_goes_on_where_it_stopped_and_shards_read_as_one(tmp_path, monkeypatch):
    rng = random.Random(1)
    texts = ["".join(rng.choices("abc ", k=rng.randint(1, 80))) for _ in range(900)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    whole = quiet("d.jsonl", "bytes")
    one = whole.splits["train"].window(0, len(whole.splits["train"]))
    monkeypatch.setattr(C, "SHARD", 3000)
    monkeypatch.setattr(C, "CACHE", str(tmp_path / "second"))
    encode, left = Tokenizer.encode_batch, [5]

    def fails(self, batch):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return encode(self, batch)
    monkeypatch.setattr(Tokenizer, "encode_batch", fails)
    with pytest.raises(KeyboardInterrupt):
        quiet("d.jsonl", "bytes")
    assert list((tmp_path / "second").rglob("train-00000.bin")) and not list((tmp_path / "second").rglob("manifest.json"))
    corpus = quiet("d.jsonl", "bytes")
    tokens = corpus.splits["train"]
    assert len(tokens.shards) > 5 and np.array_equal(tokens.window(0, len(tokens)), one)
    for start in (0, 2990, len(tokens) - 7000):  # windows across the ends of shards
        assert np.array_equal(tokens.windows([start], 7000)[0], one[start:start + 7000])


def test_windows_at_every_edge():
    tokens = Tokens([np.arange(5, dtype=np.uint16), np.arange(5, 7, dtype=np.uint16), np.arange(7, 20, dtype=np.uint16)])
    for length in (1, 4, 9, 20):
        for start in range(21 - length):
            assert tokens.window(start, length).tolist() == list(range(start, start + length))


def test_python_source_is_split_by_file_without_duplicates():
    files = C.python_files(full=False)
    assert len(files) > 200 and len({f["sha256"] for f in files}) == len(files)
    held = sum(f["split"] == "val" for f in files)
    assert 0.02 < held / len(files) < 0.10
    assert files == C.python_files(full=False)


@pytest.mark.parametrize("content, message", [("", "empty"), ("{not json}\n", "failed")])
def test_broken_files(tmp_path, content, message):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        quiet("d.jsonl", "bytes")


@pytest.mark.parametrize("data", ["nowhere.txt", "./nowhere", "pycodee", "/no/such/folder"])
def test_a_missing_path_is_named(data):
    with pytest.raises(UserError, match=data):
        quiet(data)


def test_a_hub_id_without_a_network_says_so():
    with pytest.raises(UserError, match="could not be reached.*local copy"):
        quiet("someone/some-data", "bytes")


def test_folders_of_mixed_or_no_files(tmp_path):
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match="no training files"):
        quiet("e", "bytes")
    (tmp_path / "e" / "a.txt").write_text("x")
    (tmp_path / "e" / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match="several kinds"):
        quiet("e", "bytes")


# Decontamination

def test_contamination_against_a_plain_loop():
    """Any document against any text: the share of the text's words that lie in an 8-gram which both have."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(rng.choice(words, rng.integers(3, 40))) for _ in range(30)]
    contamination = Contamination(texts)
    assert contamination.short == sum(len(text.split()) < 8 for text in texts)
    found = 0
    for _ in range(200):
        text = texts[rng.integers(30)].split()
        start = rng.integers(len(text))
        document = [*rng.choice(words, 20), *text[start:start + rng.integers(1, 30)], *rng.choice(words, 20)]
        joined = " " + " ".join(document) + " "
        best = 0
        for other in texts:
            other = other.split()
            inside = [False] * len(other)
            for i in range(len(other) - 7):
                if " " + " ".join(other[i:i + 8]) + " " in joined:
                    inside[i:i + 8] = [True] * 8
            best = max(best, sum(inside) / len(other))
        got = contamination.find(" ".join(document).upper())
        assert (got is not None) == (best > 0.5) and (got is None or got[1] == best)
        found += got is not None
    assert 20 < found < 180


def test_a_corpus_is_decontaminated(tmp_path):
    texts = [" ".join(f"word{i}-{j}" for j in range(30)) for i in range(60)]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts), encoding="utf-8")
    said = []
    whole = prepare(str(path), "bytes", log=said.append)
    cleaned = prepare(str(path), "bytes", avoid=[texts[3], texts[7] + " x" * 40, texts[19]], log=said.append)
    assert whole.manifest["splits"]["train"]["documents"] == 57 and cleaned.manifest["splits"]["train"]["documents"] == 56
    assert cleaned.manifest["splits"]["val"] == whole.manifest["splits"]["val"]  # text 19 is held out itself
    report = [json.loads(line) for line in open(os.path.join(cleaned.folder, "dropped.jsonl"))]
    assert [(row["document"], row["share"]) for row in report] == [(4, 1.0)] and any("1 of 57 documents dropped" in line for line in said)
