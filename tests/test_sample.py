"""sample.py: prompts, holes, streaming, beam search, attention, what a user can get wrong."""

import io
import itertools
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_DEC, TINY_ENC, call, one_line
from test_model import tiny

import sample
import train
from data.objectives import make_prompt
from data.tokenizer import Tokenizer
from lib.runs import newest_run
from model import Config, Transformer
from sample import Printer, beam_search

BYTES = Tokenizer("bytes")


@pytest.fixture
def talk(monkeypatch, capsys):
    return lambda *argv: call(sample.main, argv, monkeypatch, capsys)


def make_run(folder, objective, arch="encdec"):
    torch.manual_seed(0)
    layers = dict(n_enc=1, n_dec=1) if arch == "encdec" else dict(n_enc=0, src_len=0, n_dec=2)
    Transformer(
        Config(
            vocab_size=BYTES.vocab_size,
            n_embd=32,
            n_head=2,
            n_kv_head=1,
            head_dim=16,
            n_hidden=32,
            pad_id=BYTES.pad,
            bos_id=BYTES.bos,
            eos_id=BYTES.eos,
            **layers,
        )
    ).save(folder)
    BYTES.save(folder)
    with open(os.path.join(folder, "run.json"), "w") as f:
        json.dump({"settings": {"objective": objective}}, f)


def test_holes_become_sentinels():
    prompt = make_prompt("span", "a<mask>b<mask>", BYTES, False)
    assert prompt == [97, BYTES.sentinel(0), 98, BYTES.sentinel(1), BYTES.eos]
    assert make_prompt("span", "a", BYTES, False) == [97, BYTES.sentinel(0), BYTES.eos]
    assert make_prompt("span", "a<mask>", BYTES, True)[-2:] == [BYTES.eos, BYTES.sep]
    assert make_prompt("causal", "a<mask>", BYTES, True) == list(b"a<mask>")


@pytest.mark.parametrize(
    "answer, printed",
    [
        ([0, b"xy", 1, b"z"], "axybzc\n"),
        ([0, b"xy"], "axyb<mask>c\n"),
        ([1, b"z"], "a<mask>bzc\n"),
        ([], "a<mask>b<mask>c\n"),
        ([1, b"z", 0, b"xy"], "a<mask>bzxyc\n"),
    ],
)
def test_the_printer_fills_holes_as_they_come(capsys, answer, printed):
    printer = Printer(make_prompt("span", "a<mask>b<mask>c", BYTES, False), BYTES)
    for part in answer:
        for id in [BYTES.sentinel(part)] if isinstance(part, int) else part:
            printer.add(id)
    printer.finish()
    assert capsys.readouterr().out == printed


def test_streamed_characters_are_never_cut_and_control_characters_are_shown(capsys):
    printer = Printer(make_prompt("causal", "x", BYTES, True), BYTES)
    for byte in "größer 🙂\x1b[2J".encode():
        printer.add(byte)
    printer.finish()
    assert capsys.readouterr().out == "größer 🙂\\x1b[2J\n"


@pytest.mark.parametrize(
    "arch, objective",
    [
        ("encdec", "span"),
        ("encdec", "prefix"),
        ("dec", "causal"),
        ("dec", "span"),
        ("encdec", "ul2"),
    ],
)
def test_every_kind_of_run_talks(talk, arch, objective):
    make_run("out/a", objective, arch)
    for options in (
        ["--max_new_tokens=5"],
        ["--beams=3", "--max_new_tokens=5"],
        ["--num_samples=2", "--temperature=1", "--top_k=5", "--top_p=0.9", "--max_new_tokens=5"],
    ):
        status, out, err = talk("--prompt=x = <mask>\\ny", *options)
        assert status == 0 and "x = " in out, err


def test_the_newest_run_and_standard_input(talk, monkeypatch):
    make_run("out/old", "causal", "dec")
    make_run("out/new", "causal", "dec")
    os.utime("out/old/model.safetensors", (1, 1))
    assert newest_run() == os.path.join("out", "new")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    status, out, _ = talk("--max_new_tokens=2")
    assert status == 0 and out.startswith("from a pipe")


def test_one_beam_is_greedy_and_all_beams_find_the_best():
    model = tiny("encdec", vocab_size=6, pad_id=0, bos_id=1, eos_id=2)
    prompt = [3, 4, 5, 3]
    greedy = [step[0] for step in model.generate([prompt], 4)]
    assert beam_search(model, prompt, 1, 4)[: len(greedy)] == greedy
    encoded, best = model.encode(torch.tensor([prompt])), (-1e9, None)
    for n in range(1, 5):  # every answer of up to four tokens, scored by the full model
        for answer in itertools.product([0, 1, 3, 4, 5], repeat=n):
            logp = model.logits(model.decode(torch.tensor([[1, *answer]]), encoded)).log_softmax(
                -1
            )[0]
            score = sum(logp[t, id] for t, id in enumerate(answer))
            ends = [(score / n**0.6, answer)] if n == 4 else []
            ends += [((score + logp[n, 2]) / (n + 1) ** 0.6, answer)] if n < 4 else []
            best = max([best, *ends], key=lambda pair: pair[0])
    assert tuple(beam_search(model, prompt, 6**4, 4)) == best[1]


def test_a_beam_without_an_end_does_not_win_over_ended_ones():
    """[] has 0.3 and [a] 0.6 * 0.2: the search stops; an unended [a] is no answer."""
    table = torch.full((10, 9), 0.0125)  # by the last token, the start in the last row; 0 ends
    table[1], table[2, 0], table[-1, :3] = (
        torch.tensor([0.2] + 8 * [0.1]),
        0.9,
        torch.tensor([0.3, 0.6, 0.05]),
    )

    class Chain:
        config = SimpleNamespace(eos_id=0)

        def prefill(self, prompts, n):
            return SimpleNamespace(select=lambda rows: None), torch.tensor([[9]])

        def next_logits(self, states):
            return (table / table.sum(1, keepdim=True)).log()[states[:, 0]]

        def decode(self, tokens, cache):
            return tokens

    assert beam_search(Chain(), [5], 2, 6) == []


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--run=nowhere"], "nowhere"),
        (["--max_new_tokens=0"], "--max_new_tokens"),
        (["--top_p=0"], "--top_p"),
        (["--prompt="], "empty"),
        (["--num_samples=2"], "--temperature"),
        (["--beams=2", "--temperature=1"], "one of them"),
        (["--device=cuda:99"], "--device"),
        (["--temprature=1"], "did you mean --temperature?"),
    ],
)
def test_bad_input(talk, argv, says):
    make_run("out/a", "causal", "dec")
    status, _, err = talk("--prompt=x", *argv)
    assert status == 2 and says in one_line(err)


def test_no_run_at_all(talk):
    status, _, err = talk("--prompt=x")
    assert status == 2 and "no run in out/" in one_line(err)


def test_a_folder_that_is_not_whole(talk):
    make_run("out/a", "span")
    os.remove("out/a/model.safetensors")
    status, _, err = talk("--run=out/a", "--prompt=x")
    assert status == 2 and "model.safetensors is missing" in one_line(err)


def test_a_trained_run_answers(monkeypatch, capsys, text_file):
    for base in (TINY_ENC, TINY_DEC):
        assert (
            call(train.main, [*base, f"--data={text_file}", "--max_iters=3"], monkeypatch, capsys)[
                0
            ]
            == 0
        )
        status, out, err = call(
            sample.main, ["--prompt=abc <mask> d", "--max_new_tokens=4"], monkeypatch, capsys
        )
        assert status == 0 and out.startswith("abc "), err


def test_a_task_run_prints_its_answer_alone(talk):
    make_run("out/a", "seq2seq")
    assert make_prompt("seq2seq", "ab", BYTES, False) == [97, 98, BYTES.eos]
    assert make_prompt("seq2seq", "ab", BYTES, True) == [97, 98, BYTES.eos, BYTES.sep]
    outs = [
        talk("--prompt= question \\n", "--max_new_tokens=4", *more)[1]
        for more in ([], ["--beams=1"])
    ]
    assert outs[0] == outs[1] and "question" not in outs[0]


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_attention_is_what_the_model_computes(talk, arch):
    """The kernel that keeps its weights gives the same states, and its weights sum to 1."""
    model, source, answer = tiny(arch, cross_rope=arch == "encdec"), [5, 6, 7, 8, 9], [10, 11, 12]
    encdec = arch == "encdec"
    args = (
        torch.tensor([source]) if encdec else None,
        torch.tensor([(not encdec) * source + answer]),
    )
    before = model.states(*args)
    weights = sample.attention_weights(model, source, answer)
    assert torch.allclose(model.states(*args), before, atol=1e-5)
    assert weights.shape == (3, 5)
    assert (abs(weights.sum(1) - 1) < 1e-5).all() if encdec else (weights.sum(1) < 1).all()
    make_run("out/a", "seq2seq", arch)
    status, _, err = talk("--prompt=a $x$ b", "--max_new_tokens=4", "--show_attention=a.png")
    assert status == 0 and os.path.getsize("a.png") > 1000, err
