"""Tasks, metrics and batches of pairs: what comes in is what should, what cannot be used is named, scores match oracles."""
import ast
import json
import textwrap

import numpy as np
import pytest
import train
from conftest import TINY_DEC, TINY_ENC, call, one_line

import data.tasks
from data import metrics
from lib.settings import UserError
from data.pairs import ByLength, Pairs
from data.tasks import docstring_rows, is_task, load_task, names_rows
from data.tokenizer import Tokenizer

SOURCE = textwrap.dedent('''
    class A:
        def area(self, width, height):
            """Returns the area of a rectangle. Both in metres."""
            # a comment
            result = width * height
            return [result for result in (result,)]

    def nothing(a):
        return a

    def one_line(a, b): "Adds two numbers, quickly."; return a + b
''')


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# Rows

def test_docstring_rows():
    rows = list(docstring_rows(SOURCE))
    assert [row["target"] for row in rows] == ["Returns the area of a rectangle."]
    assert '"""' not in rows[0]["source"] and "# a comment" in rows[0]["source"]
    ast.parse(rows[0]["source"])


def test_names_rows():
    rows = {row["target"]: row["source"] for row in names_rows(SOURCE)}
    assert set(rows) == {"width height result", "a b"}
    source = rows["width height result"]
    assert "v2 = v0 * v1" in source and "def area(self, v0, v1)" in source
    assert not any(word in source for word in ("width", "height", "result", "Returns", "comment"))


def test_names_are_put_back():
    """Putting the names back gives the function: nothing but names was changed."""
    for row in names_rows(SOURCE):
        tree = data.tasks.Rename({f"v{i}": name for i, name in enumerate(row["target"].split())}).visit(ast.parse(row["source"]))
        name = tree.body[0].name
        original = next(node for _, node in data.tasks.functions(SOURCE) if node.name == name)
        if ast.get_docstring(original):
            original.body = original.body[1:]
        assert ast.unparse(tree) == ast.unparse(original)


def test_python_tasks_hold_out_whole_files(monkeypatch, tmp_path):
    files = []
    for i in range(60):
        text = f'def function{i}(alpha, beta):\n    """Function number {i} of this module."""\n    return alpha + beta * {i // 2 * 2}\n'
        digest = f"{i * 7919 % 251:02x}" * 32
        files.append(dict(file=f"{i}.py", sha256=digest, split="val" if i % 3 == 0 else "train", path=write(tmp_path / f"{i}.py", text)))
    monkeypatch.setattr(data.tasks, "python_files", lambda full: files)
    for _ in range(2):  # made, then from the cache
        task = load_task("docstring")
        assert {split: len(rows) for split, rows in task.splits.items()}["train"] == 40
        assert len(task.splits["val"]) + len(task.splits["test"]) == 20
    names = load_task("names")
    sources = [row["source"] for rows in names.splits.values() for row in rows]
    assert len(sources) == len(set(sources))


def test_squad_in_both_forms(tmp_path):
    paragraph = dict(context="Ada was born in London.", qas=[
        dict(question="Where?", answers=[dict(text="London", answer_start=16), dict(text="in London", answer_start=13)], is_impossible=False),
        dict(question="When?", answers=[], is_impossible=True, plausible_answers=[dict(text="London", answer_start=16)])])
    own = write(tmp_path / "squad.json", json.dumps(dict(version="v2.0", data=[dict(title="x", paragraphs=[paragraph] * 20)])))
    hub = write(tmp_path / "rows.jsonl", "".join(json.dumps(dict(id="1", title="x", context=paragraph["context"], question=qa["question"], answers=dict(
        text=[a["text"] for a in qa["answers"]], answer_start=[]))) + "\n" for qa in paragraph["qas"] * 20))
    first, second = (load_task(f"squad:{path}").splits for path in (own, hub))
    assert first == second and len(first["train"]) == 38 and len(first["val"]) == 2
    assert first["train"][0]["answers"] == ["London", "in London"] and first["train"][1]["target"] == metrics.UNANSWERABLE


def test_aligned_files_and_direction(tmp_path):
    folder = tmp_path / "pair"
    folder.mkdir()
    write(folder / "train.java", "a\u2028b\nc\n")  # a line separator of Unicode's is no line break
    write(folder / "train.cs", "A\nC\n")
    write(folder / "valid.java", "d\n")
    write(folder / "valid.cs", "D\n")
    task = load_task(f"codexglue:{folder}")
    assert task.splits == dict(train=[dict(source="a\u2028b", target="A"), dict(source="c", target="C")], val=[dict(source="d", target="D")])
    assert load_task(f"codexglue:{folder}", "cs", "java").splits["val"] == [dict(source="D", target="d")]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_any_data_set(kind, tmp_path):
    import pandas
    frame = pandas.DataFrame(dict(question=[f"q {i}" for i in range(40)], answer=[f"a {i}" for i in range(39)] + ["None"], other=1))
    path = str(tmp_path / f"rows.{kind}")
    dict(jsonl=lambda: frame.to_json(path, orient="records", lines=True), csv=lambda: frame.to_csv(path, index=False),
         parquet=lambda: frame.to_parquet(path))[kind]()
    splits = load_task(path, "question", "answer").splits
    assert len(splits["train"]) == 38 and splits["val"] == [dict(source="q 19", target="a 19"), dict(source="q 39", target="None")]
    with pytest.raises(UserError, match="question.*choose with --source_col"):
        load_task(path)


# Metrics, against other implementations

def test_squad_score_by_hand():
    rows = [dict(answers=["the Eiffel Tower", "Eiffel Tower, Paris"], target="the Eiffel Tower"), dict(answers=["42"], target="42"),
            dict(answers=[], target=metrics.UNANSWERABLE), dict(answers=[], target=metrics.UNANSWERABLE)]
    got = metrics.score_squad(["eiffel tower!", "", "unanswerable", "42"], rows)
    assert got["exact"] == 50 and got["f1"] == 50 and got["has_ans_f1"] == 50 and got["no_ans_f1"] == 50
    assert metrics.words_f1("a b c".split(), "b c d e".split()) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))


def test_rouge_l_against_a_plain_loop():
    from rouge_score import tokenize
    from rouge_score.rouge_scorer import RougeScorer

    def lcs(a, b):
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        return table[-1, -1]
    pairs = [("the cats sat on a mat", "a cat sits on the mat"), ("", "something"), ("same words", "same words")]
    want = []
    for p, r in pairs:
        p, r = (tokenize.tokenize(text, RougeScorer(["rougeL"], use_stemmer=True)._tokenizer._stemmer) for text in (p, r))
        n = lcs(p, r)
        want.append(2 * n / (len(p) + len(r)) if n else 0)
    assert metrics.rouge(*zip(*pairs))["rouge_l"] == pytest.approx(100 * np.mean(want))


def test_code_bleu_is_bleu_4_on_words():
    """BLEU by its definition: geometric mean of 1- to 4-gram precisions, times the brevity penalty."""
    from collections import Counter
    predictions = ["public int a ( ) { return 1 ; }", "void  b ( int c ) { d = c ; }"]
    references = ["public int a ( ) { return 2 ; }", "void b ( long c ) { this . d = c ; }"]
    logs = []
    for n in range(1, 5):
        same = total = 0
        for p, r in zip(predictions, references):
            p, r = (Counter(tuple(t.split()[i:i + n]) for i in range(len(t.split()) - n + 1)) for t in (p, r))
            same, total = same + sum((p & r).values()), total + sum(p.values())
        logs.append(np.log(same / total))
    lengths = [sum(len(t.split()) for t in texts) for texts in (predictions, references)]
    want = 100 * np.exp(np.mean(logs) + min(0, 1 - lengths[1] / lengths[0]))
    got = metrics.score_code(predictions, [dict(target=r) for r in references])
    assert got["bleu"] == pytest.approx(want) and got["exact"] == 0


def test_names_score():
    rows = [dict(target="width height"), dict(target="a b c")]
    assert metrics.score_names(["height width", "a b"], rows) == dict(f1=pytest.approx(100 * (1 + 0.8) / 2), exact=pytest.approx(40))


def test_a_score_needs_as_many_predictions_as_rows():
    with pytest.raises(UserError, match="1 predictions for 2 references"):
        metrics.score(data.tasks.TASKS["pairs"], ["x"], [dict(target="x")] * 2)


# Batches

def some_pairs(n=300, decoder_only=False, src_len=64, tgt_len=32):
    rng = np.random.default_rng(0)
    rows = [dict(source="s" * rng.integers(1, 80), target="t" * rng.integers(1, 40)) for _ in range(n)]
    return rows, Pairs(rows, Tokenizer("bytes"), src_len, tgt_len, decoder_only)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_pairs_hold_the_rows(decoder_only):
    rows, pairs = some_pairs(decoder_only=decoder_only)
    tok, room = pairs.tokenizer, 64 - 1 - decoder_only
    assert pairs.cut == dict(source=sum(len(r["source"]) > room for r in rows), target=sum(len(r["target"]) > 31 for r in rows))
    batch = pairs.batch([3, 1, 4])
    for b, row in enumerate([3, 1, 4]):
        src, src_mask, tgt, loss_mask = (part if part is None else part[b] for part in batch)
        want_source, want_target = rows[row]["source"][:room], rows[row]["target"][:32]
        target = tgt[loss_mask]
        assert tok.decode(target) == want_target and (target[-1] == tok.eos) == (len(want_target) < 32)
        assert tok.decode(src[src_mask] if src is not None else tgt[:loss_mask.argmax()]) == want_source
        if decoder_only:
            assert tgt[loss_mask.argmax() - 1] == tok.sep == pairs.prompt(row)[-1]
    assert max(part.shape[1] for part in batch[2:]) <= (64 + 32)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_batches_by_length(decoder_only):
    _, pairs = some_pairs(3000, decoder_only)
    order = ByLength(pairs, 1024, seed=5)
    n = len(order.plan(0))
    epoch = np.concatenate([order.rows(step) for step in range(n)])
    assert sorted(epoch) == list(range(3000))  # every row once
    assert all(pairs.cost(order.rows(step)) <= 1024 for step in range(n))
    assert order.padding() < 0.1
    later = [order.rows(step) for step in range(3 * n)]
    again = ByLength(pairs, 1024, seed=5)
    for step in (2 * n + 3, 0, n + 1):  # in any order: a pure function of the step
        assert (again.rows(step) == later[step]).all()
    assert {tuple(sorted(rows)) for rows in later[:n]} != {tuple(sorted(rows)) for rows in later[n:2 * n]}


def test_rows_of_a_step_do_not_depend_on_how_they_are_cut(monkeypatch, tmp_path):
    """One pass of 8 rows' worth, two of 4 and four of 2 hold the same rows."""
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(dict(source="s" * (5 + i % 20), target="t" * (1 + i % 7))) + "\n" for i in range(200)))
    seen = []
    for batch_size, accum in ((8, 1), (4, 2), (2, 4)):
        argv = [*TINY_ENC, f"--data={path}", "--objective=seq2seq", f"--batch_size={batch_size}", f"--grad_accum={accum}", "--max_iters=1"]
        monkeypatch.setattr("sys.argv", ["train.py", *argv])
        cfg = train.resolve(train.parse(train.Settings, ""))
        job = train.Finetuning(cfg, train.World(cfg), lambda text: None)
        rows = []
        for i in range(accum):
            src, src_mask, tgt, loss_mask, _ = job.batch_at(3, np.arange(i * batch_size, (i + 1) * batch_size))
            rows += [tuple(t[m].tolist()) for t, m in zip(tgt, loss_mask)]
        seen.append(sorted(rows))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) >= 8


# Training

def copy_task(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        letters = "".join(rng.choice(list("abcd"), rng.integers(1, 6)))
        rows.append(json.dumps(dict(source=letters, target=letters.upper())))
    return write(tmp_path / "copy.jsonl", "\n".join(rows))


@pytest.mark.parametrize("base", [TINY_ENC, TINY_DEC])
def test_learns_to_translate_letters(base, tmp_path, monkeypatch, capsys):
    """Real training to near certainty, for both architectures; the best weights are kept, and the source matters."""
    argv = [*base, f"--data={copy_task(tmp_path)}", "--objective=seq2seq", "--batch_size=16", "--max_iters=220", "--eval_interval=110", "--lr=1e-2", "--embed_lr=1e-2",
            "--out=run", "--seed=1", "--n_embd=64", "--n_head=4", "--n_kv_head=4", "--eval_rows=0"]
    status, _, err = call(train.main, argv, monkeypatch, capsys)
    assert status == 0, err
    rows = [json.loads(line) for line in open("run/log.jsonl")]
    last = [row for row in rows if "exact" in row][-1]
    assert last["exact"] > 60 and last["shuffled_loss"] > 3 * last["val_loss"]
    first = next(row for row in rows if "loss" in row)
    assert abs(first["loss"] - np.log(256 + 261)) < 0.3
    assert "best.safetensors" in __import__("os").listdir("run")


def test_resumes_exactly(tmp_path, monkeypatch, capsys):
    from model import Transformer
    path = copy_task(tmp_path)
    base = [*TINY_ENC, f"--data={path}", "--objective=seq2seq", "--eval_interval=10"]
    call(train.main, [*base, "--out=whole", "--max_iters=40"], monkeypatch, capsys)
    real, calls = train.loss_of, []

    def interrupts(*args):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "loss_of", interrupts)
    status, _, _ = call(train.main, [*base, "--out=cut", "--max_iters=40"], monkeypatch, capsys)
    assert status == 130
    monkeypatch.setattr(train, "loss_of", real)
    status, _, err = call(train.main, ["--init_from=resume", "--out=cut"], monkeypatch, capsys)
    assert status == 0, err
    a, b = (Transformer.load(run, "model.safetensors").state_dict() for run in ("whole", "cut"))
    assert all((a[name] == b[name]).all() for name in a)


def test_finetunes_a_pretrained_run(tmp_path, monkeypatch, capsys, text_file):
    call(train.main, [*TINY_ENC, f"--data={text_file}", "--out=pre", "--max_iters=3"], monkeypatch, capsys)
    argv = ["--init_from=pre", f"--data={copy_task(tmp_path)}", "--objective=seq2seq", "--max_iters=3", "--out=fine", "--src_len=64", "--tgt_len=16",
            "--batch_size=4", "--eval_rows=8", "--dtype=float32", "--device=cpu"]
    status, _, err = call(train.main, argv, monkeypatch, capsys)
    assert status == 0, err
    config = json.load(open("fine/config.json"))
    assert config["src_len"] == 64 and json.load(open("fine/tokenizer.json")) == json.load(open("pre/tokenizer.json"))
    argv[4] = "--out=again"
    status, _, err = call(train.main, [*argv, "--preset=nano", "--split=1/2"], monkeypatch, capsys)
    assert status == 2 and "--split=1/2" in err
    same = ["--preset=nano", "--split=2/3"]  # what it has anyway, as compare says it
    status, _, err = call(train.main, [*argv, *same, "--cross_rope=true"], monkeypatch, capsys)
    assert status == 0 and not config["cross_rope"] and json.load(open("again/config.json"))["cross_rope"], err


def test_a_finished_run_is_not_evaluated_again(tmp_path, monkeypatch, capsys):
    base = [*TINY_ENC, f"--data={copy_task(tmp_path)}", "--objective=seq2seq", "--eval_interval=5", "--max_iters=10", "--out=run"]
    call(train.main, base, monkeypatch, capsys)
    before = open("run/log.jsonl").read()
    status, _, err = call(train.main, ["--init_from=resume", "--out=run"], monkeypatch, capsys)
    assert status == 0 and open("run/log.jsonl").read() == before, err
    status, _, err = call(train.main, ["--init_from=resume", "--out=run", "--max_iters=15"], monkeypatch, capsys)
    assert status == 0 and [json.loads(line)["step"] for line in open("run/log.jsonl") if "val_loss" in line] == [0, 5, 10, 15], err


def test_patience(tmp_path, monkeypatch, capsys):
    argv = [*TINY_ENC, f"--data={copy_task(tmp_path)}", "--objective=seq2seq", "--max_iters=60", "--eval_interval=2", "--patience=2", "--lr=0", "--embed_lr=0",
            "--out=run"]
    status, _, err = call(train.main, argv, monkeypatch, capsys)
    assert status == 0 and "stopped: no better rouge_l in 2 evaluations" in err, err
    assert json.load(open("run/run.json"))["settings"]["patience"] == 2


# Bad input

BAD = {
    "no target": ('{"source": "a"}\n{"source": "a", "target": "b"}\n', r"1 of 2 rows cannot be used, the first is 1 \(column 'target' is missing\)"),
    "not a string": ('{"source": "a", "target": "b"}\n{"source": 5, "target": "b"}\n', r"the first is 2 \(its source is int, not text\)"),
    "empty": ('{"source": "a", "target": "b"}\n{"source": "a", "target": " "}\n', "its target is empty"),
    "a thousand": ('{"source": "a", "target": "b"}\n' + "{broken\n" * 1000, "1000 of 1001 rows cannot be used, the first are 2, 3, 4 .*--skip_bad"),
    "half a character": ('{"source": "a", "target": "b"}\n\n{"source": "\\ud83d", "target": "b"}\n', "the first is 3 .its source holds half of a character"),
    "other columns": ('{"x": "a", "y": "b"}\n' * 3, "has the columns x, y, not source and target"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case, tmp_path, monkeypatch, capsys):
    text, message = BAD[case]
    path = write(tmp_path / "rows.jsonl", text)
    status, _, err = call(train.main, [*TINY_ENC, f"--data={path}", "--objective=seq2seq", "--out=run"], monkeypatch, capsys)
    assert status == 2 and __import__("re").search(message, one_line(err)), err
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_skipped_and_counted(tmp_path):
    said, path = [], write(tmp_path / "rows.jsonl", '{"source": "a", "target": "b"}\n{broken\n' * 30)
    task = load_task(path, skip_bad=True, log=said.append)
    assert len(task.splits["train"]) + len(task.splits["val"]) == 30
    assert "30 of 60 rows cannot be used and were left out, the first ones: 2, 4, 6" in said[0]


def test_not_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"source": "a", "target": "b"}\n{"source": "\xff", "target": "b"}\n')
    with pytest.raises(UserError, match="the first is 2 .not UTF-8"):
        load_task(str(path))


def test_unequal_lines(tmp_path):
    write(tmp_path / "train.en", "a\nb\n")
    write(tmp_path / "train.de", "a\n")
    with pytest.raises(UserError, match="2 lines and .* 1: they must match"):
        load_task(f"translate:{tmp_path}", "en", "de")


@pytest.mark.parametrize("name, message", [("squad", "could not be reached.*--data=squad:PATH"), ("someone/rows", "could not be reached.*--data=PATH"),
                                           ("translate", "needs a path"), ("xsum:nowhere", "no such file"), ("docstring:x", "takes no path")])
def test_what_is_not_there(name, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        load_task(name)


def test_a_task_is_known_by_its_name():
    assert is_task("squad") and is_task("codexglue:some/where") and not is_task("pycode") and not is_task("C:\\rows.jsonl")


def test_a_task_is_no_text(monkeypatch, capsys):
    status, _, err = call(train.main, ["--data=names", "--objective=span"], monkeypatch, capsys)
    assert status == 2 and "--data=names is a task" in one_line(err)
    status, _, err = call(train.main, ["--data=pycode", "--objective=seq2seq"], monkeypatch, capsys)
    assert status == 2 and "text without sources" in one_line(err)
