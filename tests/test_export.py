"""Exported graphs against torch: logits, caches, files, precisions, what a user can do wrong."""

import os
import shutil
import subprocess
import sys
import types

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, TINY_DEC, TINY_ENC, call, one_line

import export
import model as M
import train
from data.sets import as_samples
from data.tokenizer import load_tokenizer
from lib.runs import write_json
from lib.runtime import Exported, Request, Static, pick
from lib.settings import UserError, read_json
from model import Transformer

SHAPE = dict(vocab_size=97, n_embd=32, n_head=4, n_kv_head=2, head_dim=16, n_hidden=48)
CONFIGS = {
    "small presets": dict(embed_skip=True, cross_next=True),
    "Llama": dict(qk_norm=False, bias="none"),
    "the released model": dict(mlp="gelu", qk_norm=False, bias="all", tied=False),
    "cross RoPE, no groups": dict(cross_rope=True, n_kv_head=4),
}
BOTH = pytest.mark.parametrize("arch", ["encdec", "dec"])


def random_model(arch, module=M, **changes):
    """Every weight is random, those that start at zero or one too."""
    torch.manual_seed(0)
    layers = dict(n_enc=2, n_dec=2, src_len=24) if arch == "encdec" else dict(n_enc=0, n_dec=3)
    shape = SHAPE | dict(src_len=0, tgt_len=16) | layers | changes
    model = module.Transformer(module.Config(**shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15 if p.ndim > 1 else 0.2)
        p.data += p.ndim == 1
    return model


def rows_of(model, n=6):
    """A batch, as samples.json has it."""
    rng = np.random.default_rng(5)
    src = rng.integers(3, 97, (n, 20)) if model.config.n_enc else None
    return src, rng.integers(3, 97, (n, 14)), np.ones((n, 14), bool)


def exported(model, folder, precision="fp32", static=False):
    shutil.rmtree(folder, ignore_errors=True)
    if static:
        lengths = 24 * (model.config.n_enc > 0), 200
        export.write_static(model, folder, precision, "causal", lengths, rows_of(model))
    else:
        export.write(model, folder, precision)
    return (Static if static else Exported)(folder, threads=1)


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 97, n).tolist() for n in lengths]


def logits_of(twin, prompts, new):
    """(new, B, V), fed the same tokens whatever it says."""
    request, logits = twin.start(prompts, new)
    tokens = np.random.default_rng(1).integers(3, 97, new - 1)
    steps = [request.step(np.full(len(prompts), token)) for token in tokens]
    return np.stack([logits, *steps])


@torch.inference_mode()
def torch_logits(model, prompts, new):
    cache, states = model.prefill(prompts, new)
    found = [model.logits(states[:, -1])]
    for token in np.random.default_rng(1).integers(3, 97, new - 1):
        states = model.decode(torch.full((len(prompts), 1), int(token)), cache=cache)
        found.append(model.logits(states[:, -1]))
    return torch.stack(found).numpy()


def graphs_of(folder):
    for name in sorted(os.listdir(folder)):
        if name.endswith(".onnx"):
            yield onnx.load(os.path.join(folder, name)).graph


# --- float32 says what torch says


@BOTH
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_torch(name, arch, tmp_path):
    """Rows, sources and pasts of several lengths, prefixes, lengths past the trained one where each
    row has a RoPE of its own; and the proof that every export goes through accepts them."""
    model = random_model(arch, **CONFIGS[name])
    twin = exported(model, tmp_path / "x")
    export.prove(model, twin)
    for lengths in ([5], [1, 9, 4], [33, 3]):
        a = torch_logits(model, prompts_of(lengths), 12)
        b = logits_of(twin, prompts_of(lengths), 12)
        np.testing.assert_allclose(b, a, atol=2e-5 * max(1, np.abs(a).max()))
    prompts = prompts_of([6, 2, 11], seed=3)
    assert list(twin.generate(prompts, 16)) == list(model.generate(prompts, 16))
    twin = exported(model, tmp_path / "x", static=True)
    export.prove(model, twin)
    for length, new in ((5, 9), (24, 9), (1, 30), (150, 20)):
        if length <= 24 or arch == "dec":
            a = torch_logits(model, prompts_of([length]), new)
            b = logits_of(twin, prompts_of([length]), new)
            np.testing.assert_allclose(b, a, atol=2e-5 * max(1, np.abs(a).max()))


def test_without_a_begin_token(tmp_path):
    model = random_model("dec", bos_id=-1)
    for static in (False, True):
        twin = exported(model, tmp_path / "x", static=static)
        export.prove(model, twin)
        a, b = (f(x, [[5, 6, 7]], 6) for f, x in ((torch_logits, model), (logits_of, twin)))
        np.testing.assert_allclose(b, a, atol=1e-4)
        report = export.compare(model, twin, rows_of(model), prompts_of([4, 5]), 4)
        assert abs(report["loss_change"]) < 1e-5 and report["agreement"] == 1
        with pytest.raises(UserError, match="must not be empty"):
            twin.start([[]], 3)


@BOTH
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_row_alone_is_the_row_in_a_batch(arch, precision, tmp_path):
    """In int8, too, a row's numbers do not depend on its neighbours, however large theirs are."""
    model = random_model(arch)
    with torch.no_grad():
        model.embed.weight[50:] *= 30  # some tokens are far larger than others
    twin = exported(model, tmp_path / "x", precision)
    prompts = [[5, 6, 7, 8], [60, 61], [*range(10, 23)]]
    together = logits_of(twin, prompts, 5)
    for b, prompt in enumerate(prompts):
        alone = logits_of(twin, [prompt], 5)[:, 0]
        np.testing.assert_allclose(together[:, b], alone, atol=2e-4 * np.abs(alone).max())


@BOTH
def test_a_chunk_of_tokens_goes_through_the_same_graph(arch, tmp_path):
    """No past, several tokens of it, one at a time: the same logits; caches are written in place.
    Another layout of torch's attention changes nothing."""
    model = random_model(arch)
    twin, ids = exported(model, tmp_path / "x"), np.array(prompts_of([9])[0])
    memory = twin.encode(prompts_of([5])) if arch == "encdec" else {}

    def read(sizes):
        request, found = Request(twin, np.array([9]), 1, memory), []
        place = request.fixed["past_key_0"].data_ptr()
        for chunk in np.split(ids, np.cumsum(sizes)[:-1]):
            found.append(request.feed(chunk[None], np.array([len(chunk)]), np.arange(len(chunk))))
        assert request.fixed["past_key_0"].data_ptr() == place
        assert np.abs(request.fixed["past_key_0"].numpy()).min(axis=(1, 3)).min() > 0
        return np.concatenate(found)

    for sizes in ([4, 5], [1] * 9, [6, 1, 2]):
        np.testing.assert_allclose(read(sizes), read([9]), atol=1e-4)
    for attention in (module for module in model.modules() if isinstance(module, M.Attention)):
        kernel = attention.kernel
        attention.kernel = lambda *args, kernel=kernel: kernel(*args).mT.contiguous().mT
    export.prove(model, twin)


# --- an edited model.py is refused, whatever the precision

BLOCK = "block(x, rope, mask)"
NORMED, SKIP = "\n        return self.dec_norm(x)", " + self.skip.mean(1, keepdim=True)"
EDITS = {
    "ReLU squared": ("F.silu(self.gate(x))", "F.relu(self.gate(x)).square()"),
    "skip connection": (f"x = {BLOCK}", f"x = self.skip = {BLOCK}", NORMED, SKIP + NORMED),
    "one more matrix": ("self.up = nn", "self.more = nn.Linear(8, 8)\n        self.up = nn"),
    "other names": ("self.gate", "self.door"),
    "no QK-norm": ("q = self.q_norm(self.wq(x)", "q = (self.wq(x)"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_is_refused(name, tmp_path, monkeypatch, capsys):
    with open(M.__file__, encoding="utf-8") as file:
        source = file.read()
    for old, new in zip(EDITS[name][::2], EDITS[name][1::2]):
        assert old in source
        source = source.replace(old, new)
    edited = types.ModuleType("edited")
    monkeypatch.setitem(sys.modules, "edited", edited)
    exec(compile(source, "edited.py", "exec"), edited.__dict__)
    run_folder(random_model("encdec", edited, vocab_size=600), "run")
    monkeypatch.setattr(export, "Transformer", edited.Transformer)
    for how in ("fp32", "fp16", "int8", "int4", "fp32 --static", "int8 --static"):
        words = ["--run=run", "--out=x", *f"--precision={how}".split()]
        status, _, err = call(export.main, words, monkeypatch, capsys)
        assert status == 2 and "model.py" in one_line(err) and sorted(os.listdir()) == ["run"]


def run_folder(model, folder, objective="seq2seq"):
    """As train.py leaves it, without training."""
    model.save(folder)
    load_tokenizer("bytes").save(folder)
    settings = dict(objective=objective, src_len=24, tgt_len=16)
    write_json(f"{folder}/samples.json", as_samples(rows_of(model)))
    write_json(f"{folder}/run.json", dict(settings=settings))


# --- few bits


def saturated(a, b):
    """a (M, K) uint8 times b (K, N) int8 on a CPU without VNNI: pairs are added in 16 bits."""
    products = a.astype(np.int32)[:, :, None] * b.astype(np.int32)[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1)


def check_codes(codes):
    """Whether codes (K, N) int8 are right on every CPU, for any activations."""
    codes, rng = codes[: len(codes) // 2 * 2], np.random.default_rng(0)
    a = rng.integers(0, 256, (8, len(codes)), dtype=np.uint8)
    a[0], a[1], a[2] = 255, 255 * (codes[:, 0] > 0), 255 * (codes[:, 0] < 0)
    return np.array_equal(saturated(a, codes), a.astype(np.int32) @ codes.astype(np.int32))


@BOTH
@pytest.mark.parametrize("how", ["int8", "int4", "static"])
def test_no_product_saturates_on_any_cpu(arch, how, tmp_path):
    exported(random_model(arch), tmp_path / "x", how.replace("static", "int8"), how == "static")
    kinds = set()
    for graph in graphs_of(tmp_path / "x"):
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:
            kinds.add(node.op_type)
            if node.op_type == "MatMulIntegerToFloat":
                assert check_codes(tensors[node.input[1]])
            elif how == "static" and node.op_type == "QuantizeLinear":
                assert tensors[node.input[2]].dtype == np.uint16
    wrong = {"MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention"}
    assert not kinds & wrong and ("MatMulNBits" in kinds) == (how != "static")
    integers = how != "static" and (how, arch) != ("int4", "dec")
    assert ("MatMulIntegerToFloat" in kinds) == integers
    full = np.random.default_rng(0).integers(-127, 128, (32, 4)).astype(np.int8)
    assert not check_codes(full)  # what 8 bits would do


def test_codes_are_near():
    """Every weight within half a step of its scale, also in the last block, which is not full."""
    weight = np.random.default_rng(0).standard_normal((24, 80)).astype(np.float32)
    packed, scales = export.quantize_blocks(weight, 8, 32)
    blocks = (packed.reshape(24, 3, 32).astype(np.float32) - 128) * scales[:, :, None]
    assert np.abs(blocks.reshape(24, -1)[:, :80] - weight).max() <= 0.51 * np.abs(scales).max()
    codes, scales = export.quantize_rows(weight)
    assert (np.abs(codes * scales[:, None] - weight) <= 0.51 * scales[:, None]).all()
    assert (np.abs(codes).max(1) >= 63).all()  # all of 7 bits


@BOTH
def test_precisions(arch, tmp_path):
    """Smaller files, each weight in them once; logits near those of float32 in proportion to what
    was dropped."""
    model = random_model(arch, n_embd=64, vocab_size=1000)
    wanted = torch_logits(model, prompts_of([5, 8]), 6)
    limits = dict(fp32=(4, 1e-5), fp16=(2, 0.01), int8=(1.5, 0.06), int4=(1.2, 0.5))
    for precision, (size, near) in limits.items():
        twin = exported(model, tmp_path / "x", precision)
        assert os.path.getsize(tmp_path / "x/weights.bin") < 1.02 * size * model.num_params()
        found = logits_of(twin, prompts_of([5, 8]), 6)
        assert np.abs(found - wanted).mean() < near * np.abs(wanted).mean()
    for graph in graphs_of(tmp_path / "x"):
        assert not {node.op_type for node in graph.node} & {"If", "Loop", "Scan"}


@BOTH
def test_the_report_tells_what_differs(arch, tmp_path):
    """Of an export of another model: its loss, its logits, its next tokens."""
    model, other = random_model(arch, tied=False), random_model(arch, tied=False)
    for p in other.parameters():
        p.data += 0.05 * torch.randn_like(p)
    (src, tgt, mask), prompts = rows_of(model), prompts_of([5, 7, 6, 4, 9, 8])
    batch = [x if x is None else torch.from_numpy(x) for x in (src, tgt, mask)]
    report = export.compare(model, exported(other, tmp_path / "x"), (src, tgt, mask), prompts, 6)
    with torch.inference_mode():
        losses = [(m(*batch) / batch[2].sum()).item() for m in (model, other)]
        a, b = (m.logits(m.states(*batch[:2])) for m in (model, other))
    assert [report["torch_loss"], report["loss"]] == pytest.approx(losses, rel=1e-4)
    assert report["loss_change"] == pytest.approx(losses[1] / losses[0] - 1, rel=1e-3)
    assert report["logit_difference"] == pytest.approx((a - b).abs().max().item(), rel=1e-3)
    assert 0 < report["agreement"] < 1


@BOTH
def test_static_codes(arch, tmp_path):
    """ONNX's own operators, every size a number, every activation rounded, logits near."""
    model = random_model(arch)
    twin = exported(model, tmp_path / "x", "int8", static=True)
    a, b = (f(x, prompts_of([20]), 30) for f, x in ((torch_logits, model), (logits_of, twin)))
    assert np.abs(a - b).mean() < 0.05 * np.abs(a).mean()
    names = [graph.name for graph in graphs_of(tmp_path / "x")]
    assert names == (["decoder", "encoder"] if arch == "encdec" else ["decoder", "prefill"])
    for graph in graphs_of(tmp_path / "x"):
        assert {node.domain for node in graph.node} == {""}
        for value in (*graph.input, *graph.output):
            assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
        readers = {name: node.op_type for node in graph.node for name in node.input}
        for node in graph.node:
            if node.op_type in ("MatMul", "Add", "Mul", "Softmax", "Concat", "Div"):
                assert [readers[name] for name in node.output] == ["QuantizeLinear"]


def test_static_limits(tmp_path):
    model = random_model("encdec")
    export.write_static(model, tmp_path / "x", "fp32", "seq2seq", (10, 8), rows_of(model))
    twin = Static(tmp_path / "x", threads=1)
    assert list(twin.generate([[5] * 10], 8)) == list(model.generate([[5] * 10], 8))
    for prompts, new, message in (
        ([[5] * 11], 8, "has 11 tokens, this export has --src_len=10"),
        ([[5]], 9, "9 positions > --tgt_len=8"),
        ([[5], [6]], 8, "one prompt at a time"),
    ):
        with pytest.raises(UserError, match=message):
            next(twin.generate(prompts, new))


def test_pick():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]] * 4000, dtype=np.float32))
    for how, wanted in (
        ((1.0, 0, 1.0), [0.5, 0.3, 0.15, 0.05]),
        ((1.0, 2, 1.0), [0.625, 0.375, 0, 0]),
        ((1.0, 0, 0.7), [0.625, 0.375, 0, 0]),
        ((0.0, 0, 1.0), [1, 0, 0, 0]),
    ):
        rngs = [np.random.default_rng(b) for b in range(4000)]
        share = np.bincount(pick(logits, *how, rngs), minlength=4) / 4000
        np.testing.assert_allclose(share, wanted, atol=0.03)


# --- through the script's door


@pytest.mark.parametrize("arch", [TINY_ENC, TINY_DEC])
def test_from_a_run_to_text_without_torch(arch, text_file, monkeypatch, capsys):
    """Train, lose the data, export, and answer in a process that cannot import torch. int8 loses
    less than 1% and int4 less than 3% of the loss."""

    def go(main, *words):
        return call(main, words, monkeypatch, capsys)

    train_words = [*arch, f"--data={text_file}", "--max_iters=30", "--out=run"]
    assert go(train.main, *train_words)[0] == 0
    os.remove(text_file)
    for how, most in (("fp32", 1e-5), ("int8", 0.01), ("int4", 0.03), ("int8 --static", 0.01)):
        words = ["--run=run", "--out=folder", "--json=report.json", *f"--precision={how}".split()]
        status, out, err = go(export.main, *words)  # over the one before
        assert status == 0 and "rows that the run kept" in out, out + err
        report = read_json("report.json")["rows"][0]
        assert abs(report["loss_change"]) < most
    assert report["rows"] == 8 and sorted(os.listdir()) == ["cache", "folder", "report.json", "run"]
    os.remove("run/samples.json")
    assert "of the Python library" in go(export.main, "--run=run", "--out=folder")[1]
    prompt = list(b"abc de")
    wanted = [step[0] for step in Transformer.load("run").generate([prompt], 12)]
    code = (
        f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {ROOT!r}); "
        "from lib.runtime import Exported; twin = Exported('folder', 1); "
        f"print([step[0] for step in twin.generate([{prompt}], 12)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(wanted), done.stderr


def test_bad_input(monkeypatch, capsys):
    def refused(*words):
        status, _, err = call(export.main, words, monkeypatch, capsys)
        assert status == 2
        return one_line(err)

    run_folder(random_model("dec", vocab_size=600), "run", "causal")
    for words, message in (
        (["--precision=int4", "--static"], "fp32, int8"),
        (["--src_len=9", "--static"], "has no encoder"),
        (["--format=run", "--out=x"], "is for hf:"),
    ):
        assert message in refused("--run=run", *words)
    assert "is for hf:" in refused("--run=hf:x")
    write_json("run/samples.json", dict(src=None, tgt=[[10**9]], loss_mask=[[True]]))
    assert "samples.json is damaged" in refused("--run=run")
    assert sorted(os.listdir()) == ["run"]


def test_a_damaged_or_absurd_export_is_refused(tmp_path):
    folder = tmp_path / "x"
    exported(random_model("dec"), folder, "int8")
    about = read_json(folder / "export.json")
    for wrong in (dict(vocab_size=10**40), dict(n_enc=1), dict(eos_id=[2]), dict(head_dim=2)):
        write_json(folder / "export.json", about | wrong)
        with pytest.raises(UserError):
            Exported(folder)
    write_json(folder / "export.json", about)
    for name in ("decoder.onnx", "weights.bin"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="cannot be loaded"):
            Exported(folder)
        (folder / name).write_bytes(whole)
