"""Tasks, metrics and batches of pairs: what cannot be used is named, scores match oracles."""

import ast
import json
import os
import re
import textwrap

import numpy as np
import pytest
from conftest import TINY_DEC, TINY_ENC, call, log_rows, one_line
from test_data import write_table

import data.tasks
import train
from data import metrics, picture_tasks
from data.sets import Pairs, TaskSet
from data.tasks import TASKS, docstring_rows, is_task, load_task, names_rows
from data.tokenizer import Tokenizer
from lib.settings import UserError
from model import Transformer

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


def write(path, rows):
    text = rows if type(rows) is str else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- rows


def test_python_rows():
    rows = list(docstring_rows(SOURCE))
    assert [row["target"] for row in rows] == ["Returns the area of a rectangle."]
    assert '"""' not in rows[0]["source"] and "# a comment" in rows[0]["source"]
    ast.parse(rows[0]["source"])
    rows = {row["target"]: row["source"] for row in names_rows(SOURCE)}
    assert set(rows) == {"width height result", "a b"}
    source = rows["width height result"]
    assert "v2 = v0 * v1" in source and "def area(self, v0, v1)" in source
    for names, source in rows.items():  # putting the names back gives the function
        back = {f"v{i}": name for i, name in enumerate(names.split())}
        tree, found = data.tasks.Rename(back).visit(ast.parse(source)), data.tasks.functions(SOURCE)
        original = next(node for _, node in found if node.name == tree.body[0].name)
        if ast.get_docstring(original):
            original.body = original.body[1:]
        assert ast.unparse(tree) == ast.unparse(original)


def test_python_tasks_hold_out_whole_files(monkeypatch, tmp_path):
    files = []
    for i in range(60):
        doc = f'    """Function number {i} of this module."""\n'
        text = f"def function{i}(alpha, beta):\n{doc}    return alpha + beta * {i // 2 * 2}\n"
        about = dict(sha256=f"{i * 7919 % 251:02x}" * 32, split="train" if i % 3 else "val")
        files.append(about | dict(file=f"{i}.py", path=write(tmp_path / f"{i}.py", text)))
    monkeypatch.setattr(data.tasks, "python_files", lambda full: files)
    for _ in range(2):  # made, then from the cache
        splits = load_task("docstring").splits
        assert len(splits["train"]) == 40 and len(splits["val"]) + len(splits["test"]) == 20
    names = load_task("names").splits.values()
    sources = [row["source"] for rows in names for row in rows]
    assert len(sources) == len(set(sources))


def test_squad_in_both_forms(tmp_path):
    answers = [dict(text=text, answer_start=16) for text in ("London", "in London")]
    known = dict(question="Where?", answers=answers, is_impossible=False)
    unknown = dict(question="When?", answers=[], is_impossible=True)
    paragraph = dict(context="Ada was born in London.", qas=[known, unknown])
    about = dict(data=[dict(paragraphs=[paragraph] * 20)])
    own, rows = write(tmp_path / "squad.json", json.dumps(about)), []
    for qa in paragraph["qas"] * 20:
        texts = dict(text=[answer["text"] for answer in qa["answers"]], answer_start=[])
        rows.append(dict(context=paragraph["context"], question=qa["question"], answers=texts))
    hub = write(tmp_path / "rows.jsonl", rows)
    first, second = (load_task(f"squad:{path}").splits for path in (own, hub))
    assert first == second and len(first["train"]) == 38 and len(first["val"]) == 2
    assert first["train"][0]["answers"] == ["London", "in London"]
    assert first["train"][1]["target"] == metrics.UNANSWERABLE


def test_aligned_files_and_direction(tmp_path):
    texts = {"train.java": "a\u2028b\nc\n", "train.cs": "A\nC\n"}  # U+2028 is no line break
    texts |= {"valid.java": "d\n", "valid.cs": "D\n"}
    for name, text in texts.items():
        write(tmp_path / name, text)
    train_rows = [dict(source="a\u2028b", target="A"), dict(source="c", target="C")]
    task = load_task(f"codexglue:{tmp_path}")
    assert task.splits == dict(train=train_rows, val=[dict(source="d", target="D")])
    back = load_task(f"codexglue:{tmp_path}", "cs", "java")
    assert back.splits["val"] == [dict(source="D", target="d")]
    write(tmp_path / "train.cs", "A\n")
    with pytest.raises(UserError, match="2 lines and .* 1: they must match"):
        load_task(f"codexglue:{tmp_path}")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_any_data_set_and_leaks_are_told(kind, tmp_path):
    answers = [f"a {i}" for i in range(39)] + ["None"]
    questions = [f"q {i % 30}" for i in range(40)]
    path, said = tmp_path / f"rows.{kind}", []
    write_table(path, dict(question=questions, answer=answers, other=1))
    splits = load_task(str(path), "question", "answer", said.append).splits
    assert len(splits["train"]) == 38
    assert splits["val"] == [dict(source="q 19", target="a 19"), dict(source="q 9", target="None")]
    assert "1 of 2 held-out sources are in train" in said[0]
    with pytest.raises(UserError, match="question.*choose with --source_col"):
        load_task(str(path))


# --- metrics, against other implementations


def test_squad_score_by_hand():
    rows = [["the Eiffel Tower", "Eiffel Tower, Paris"], ["42"], [], []]
    rows = [dict(answers=answers, target="x") for answers in rows]
    got = metrics.score_squad(["eiffel tower!", "", "unanswerable", "42"], rows)
    assert {got[name] for name in ("exact", "f1", "has_ans_f1", "no_ans_f1")} == {50}
    both = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert metrics.words_f1("a b c".split(), "b c d e".split()) == pytest.approx(both)


def test_code_bleu_is_bleu_4_on_words():
    rows = [dict(target="int a ( b ;")] * 2
    got = metrics.score_code(["int  a ( b ]", "int a ( b ]"], rows)
    precisions = 4 / 5, 3 / 4, 2 / 3, 1 / 2  # of one to four words in a row
    assert got["bleu"] == pytest.approx(100 * np.prod(precisions) ** 0.25) and got["exact"] == 0


def test_scores_of_answers_about_pictures():
    rows = [dict(target=t, images=[]) for t in ("12", "a = 50%", "Blue", "b = 7")]
    charts, rows[0]["kind"] = picture_tasks.TASKS["charts"], "value"
    got = metrics.score(charts, ["12.5", "so = 0.5", "blue", "b = 6"], rows)
    assert (got["relaxed"], got["relaxed_value"], got["exact"]) == (75, 100, 0)
    rows = [dict(target="yes", answers=["yes"] * 2 + ["no"] * 8), dict(target="word")]
    got = metrics.score_vqa(["Yes!", "ward"], rows)["vqa"]
    assert got == pytest.approx(100 * (8 * 2 / 3 + 2 * 1 / 3) / 10 / 2)
    assert metrics.score_anls(["YES", "ward"], rows)["anls"] == 100 * (1 + 3 / 4) / 2
    assert metrics.score_reading(["yes", "warden"], rows)["characters"] == 100 * (1 + 1 / 4) / 2


def test_other_scores():
    rows = [dict(target="width height"), dict(target="a b c")]
    f1 = pytest.approx(100 * (1 + 0.8) / 2)
    assert metrics.score_names(["height width", "a b"], rows) == dict(f1=f1, exact=40)
    assert metrics.score_text(["a b"], [dict(target="a b c")])["rouge_l"] == pytest.approx(80)
    with pytest.raises(UserError, match="1 predictions for 2 references"):
        metrics.score(TASKS["pairs"], ["x"], [dict(target="x")] * 2)


# --- batches


def some_pairs(n=300, decoder_only=False):
    rng, rows = np.random.default_rng(0), []
    for _ in range(n):
        rows.append(dict(source="s" * rng.integers(1, 80), target="t" * rng.integers(1, 40)))
    return rows, Pairs(rows, Tokenizer("bytes"), 64, 32, decoder_only)


@pytest.mark.parametrize("dec", [False, True])
def test_pairs_hold_the_rows(dec):
    rows, pairs = some_pairs(decoder_only=dec)
    tok, room = pairs.tokenizer, 64 - 1 - dec
    assert pairs.cut == sum(len(row["source"]) > room for row in rows)
    assert pairs.cut_targets == sum(len(row["target"]) > 31 for row in rows)
    src, tgt, loss_mask = pairs.batch([3, 1, 4])
    for b, row in enumerate([3, 1, 4]):
        target, want = tgt[b][loss_mask[b]], rows[row]["target"][:32]
        assert tok.decode(target) == want and (target[-1] == tok.eos) == (len(want) < 32)
        source = tgt[b, : loss_mask[b].argmax()] if dec else src[b]
        assert tok.decode(source) == rows[row]["source"][:room]
        assert not dec or source[-1] == tok.sep == pairs.prompt(row)[-1]


@pytest.mark.parametrize("dec", [False, True])
def test_batches_by_length_are_a_pure_function_of_the_step(dec):
    _, pairs = some_pairs(3000, dec)
    cfg = train.Settings(src_len=64, tgt_len=64, seed=5)
    order = TaskSet(TASKS["pairs"], pairs, 8, cfg)
    n, lengths = len(order.plan(0)), pairs.lengths
    epoch = [order.rows(step) for step in range(n)]
    assert sorted(np.concatenate(epoch)) == list(range(3000))  # every row once
    widest = [(lengths[r].sum(1) + 1).max() if dec else lengths[r].max(0).sum() for r in epoch]
    computed = [width * len(rows) for width, rows in zip(widest, epoch)]
    assert max(computed) <= 1024 and lengths.sum() / sum(computed) > 0.9
    assert abs(np.corrcoef(widest, range(n))[0, 1]) < 0.4  # in no order
    later = [order.rows(step) for step in range(2 * n)]
    assert {*map(tuple, epoch)} != {*map(tuple, later[n:])}
    again = TaskSet(TASKS["pairs"], pairs, 8, cfg)
    for step in (n + 3, 0, n - 1):  # in any order
        assert (again.rows(step) == later[step]).all()
    seen = []
    for parts in (1, 2, 4):  # one pass of 8 rows' worth, two of 4 and four of 2 hold the same
        rows = []
        for i in range(parts):
            _, tgt, mask = order.batch(3, np.arange(8)[i * 8 // parts : (i + 1) * 8 // parts])
            rows += [tuple(t[m]) for t, m in zip(tgt, mask) if m.any()]
        seen.append(sorted(rows))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) >= 8


# --- training


def letters(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for _ in range(400):
        word = "".join(rng.choice(list("abcd"), rng.integers(1, 4)))
        rows.append(dict(source=word, target=word.upper()))
    return write(tmp_path / "letters.jsonl", rows)


@pytest.mark.parametrize("base", [TINY_ENC, TINY_DEC])
def test_learns_to_translate_letters(base, tmp_path, monkeypatch, capsys):
    """For both architectures the source matters, and the best weights are kept."""
    columns = ["--source_col=source", "--target_col=target"]  # which say that it is a task
    argv = [*base, f"--data={letters(tmp_path)}", *columns, "--vocab_size=300", "--batch_size=16"]
    argv += ["--src_len=8", "--tgt_len=8", "--max_iters=60", "--eval_interval=60", "--eval_rows=0"]
    argv += ["--lr=3e-2", "--embed_lr=1e-2", "--threads=1", "--out=run"]
    status, out, err = call(train.main, argv, monkeypatch, capsys)
    assert status == 0, err
    assert "--vocab_size=300 is ignored: --tokenizer=bytes has 517 ids" in out + err
    assert "held-out sources are in train, too" in out + err and "val: 20 rows" in out + err
    assert Transformer.load("run").config.cross_rope == (base is TINY_ENC)
    last = log_rows("run", "exact")[-1]
    assert last["shuffled_loss"] > 2 * last["val_loss"] and last["exact"] > 20
    assert os.path.exists("run/best.safetensors")


# --- bad input

GOOD = '{"source": "a", "target": "b"}\n'
BAD = [
    ('{"source": "a"}\n' + GOOD, "1 of 2 .* are 1 .column 'target' is missing"),
    (GOOD + '{"source": 5, "target": "b"}\n', "are 2 .its source is int, not text"),
    (GOOD + '{"source": "a", "target": " "}\n', "its target is empty"),
    (GOOD + "{broken\n" * 1000, "1000 of 1001 rows cannot be used.* are 2, 3, 4"),
    (GOOD + '\n{"source": "\\ud83d", "target": "b"}\n', "are 3 .*surrogates"),
    ('{"x": "a", "y": "b"}\n' * 3, "has the columns x, y, not source and target"),
    (GOOD + '{"source": ' + "9" * 6000 + "}\n[]\n", "2 of 3 rows cannot be used"),
    ("[" * 200000, "cannot be read as JSON"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_rows_are_named(case, tmp_path, monkeypatch, capsys):
    text, says = BAD[case]
    path = write(tmp_path / "rows.jsonl", text)
    argv = [*TINY_ENC, f"--data={path}", "--objective=seq2seq", "--out=run"]
    status, _, err = call(train.main, argv, monkeypatch, capsys)
    assert status == 2 and re.search(says, one_line(err)) and not os.path.exists("run"), err


@pytest.mark.parametrize(
    "name, says",
    [("squad", "could not be loaded.*--data=TASK:PATH"), ("translate", "needs a path")]
    + [("xsum:nowhere", "no such file"), ("docstring:x", "without a path")],
)
def test_what_is_not_there(name, says):
    with pytest.raises(UserError, match=says):
        load_task(name)


def test_a_task_is_known_by_its_name_and_is_no_text(monkeypatch, capsys):
    assert is_task("squad") and is_task("codexglue:x") and not is_task("pycode")
    for name, objective, says in (("names", "span", "a task"), ("pycode", "seq2seq", "is text")):
        argv = [f"--data={name}", f"--objective={objective}"]
        status, _, err = call(train.main, argv, monkeypatch, capsys)
        assert status == 2 and says in one_line(err)
