"""Exported graphs against torch: logits with caches at many shapes, files, precisions, what a user can do wrong."""
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

import export
import sample
import train
from conftest import ROOT, TINY_DEC, TINY_ENC, call, one_line
from lib.runtime import Exported, Request, Static, pick
from lib.settings import UserError
from test_model import tiny

CONFIGS = {
    "grouped": dict(),
    "plain Llama": dict(qk_norm=False),
    "biases": dict(qkv_bias=True, bias=True),
    "cross RoPE": dict(cross_rope=True),
    "gelu, untied": dict(mlp="gelu", tied=False, embed_scale=3.0),
    "no groups": dict(n_kv_head=4, n_head=4),
    "factors of RoPE": dict(rope_factors=[1.0 + i / 4 for i in range(8)], rope_long=[2.0 + i for i in range(8)], rope_scale=1.2, cross_rope=True),
    "the released model": dict(mlp="gelu", qk_norm=False, qkv_bias=True, bias=True, head_bias=True),
}


def exported(model, folder, precision="fp32"):
    export.write(model, str(folder), precision)
    return Exported(str(folder), threads=2)


def prompts_of(model, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, model.config.vocab_size, n).tolist() for n in lengths]


@torch.inference_mode()
def step_by_step(model, twin, prompts, new, prefix=None):
    """Logits of torch and of the export, (new, B, V) each, fed the same tokens one at a time after the prompts."""
    cache, states = model.prefill(prompts, new, prefix)
    request, logits = twin.start(prompts, new, prefix)
    pairs = [(model.logits(states[:, -1]).numpy(), logits)]
    for token in np.random.default_rng(1).integers(3, model.config.vocab_size, (new - 1, len(prompts))):
        states = model.decode(torch.from_numpy(token)[:, None], cache=cache)
        pairs.append((model.logits(states[:, -1]).numpy(), request.step(token)))
    return [np.stack(side) for side in zip(*pairs)]


@pytest.mark.parametrize("arch", ["encdec", "dec"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_torch(name, arch, tmp_path):
    """Several numbers of rows, lengths of source and of past, prefixes, and lengths past the trained one, where each row has a
    RoPE of its own."""
    model = tiny(arch, **CONFIGS[name])
    twin = exported(model, tmp_path / "x")
    trained = model.config.src_len or model.config.tgt_len
    for lengths, prefix in (([5], None), ([1, 9, 4], [[], [7], [5, 6, 8]]), ([trained + 9, 3], None)):
        a, b = step_by_step(model, twin, prompts_of(model, lengths), 12, prefix)
        np.testing.assert_allclose(b, a, atol=2e-5 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_a_row_alone_in_a_batch_and_among_longer_ones(arch, tmp_path):
    model = tiny(arch)
    twin, prompts = exported(model, tmp_path / "x"), prompts_of(model, [6, 2, 11])
    together = [twin.generate(prompts, 10), *([twin.generate([prompt], 10)] for prompt in prompts)]
    together = list(together[0])
    alone = [list(twin.generate([prompt], 10)) for prompt in prompts]
    for b in range(3):
        assert [step[b] for step in together if step[b] is not None] == [step[0] for step in alone[b] if step[0] is not None]


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_greedy_answers_are_those_of_torch(arch, tmp_path):
    model = tiny(arch)
    prompts = prompts_of(model, [6, 2, 11], seed=3)
    assert list(exported(model, tmp_path / "x").generate(prompts, 16)) == list(model.generate(prompts, 16))


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_a_chunk_of_tokens_goes_through_the_same_graph(arch, tmp_path):
    """Zero tokens of past, several of them, and one at a time: the same logits; the caches are written where they lie."""
    model = tiny(arch)
    twin, ids = exported(model, tmp_path / "x"), np.array(prompts_of(model, [9])[0])
    memory = twin.encode(prompts_of(model, [5])) if arch == "encdec" else ({}, None)

    def read(sizes):
        request, found = Request(twin, [9], 1, *memory), []
        place = request.fixed["past_key_0"].data_ptr()
        for chunk in np.split(ids, np.cumsum(sizes)[:-1]):
            found.append(request.feed(chunk[None], np.array([len(chunk)]), np.arange(len(chunk))))
        assert request.fixed["past_key_0"].data_ptr() == place
        keys = request.fixed["past_key_0"].numpy()
        assert np.abs(keys).min(axis=(1, 3)).min() > 0  # every slot has been written
        return np.concatenate(found)

    whole = read([9])
    for sizes in ([4, 5], [1] * 9, [6, 1, 2]):
        np.testing.assert_allclose(read(sizes), whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_files_hold_each_weight_once(arch, tmp_path):
    """Bytes of the weights as float32, tied embeddings among them once, and no control flow; nothing but logits and caches comes out."""
    model = tiny(arch, vocab_size=4000)
    exported(model, tmp_path / "x")
    size = os.path.getsize(tmp_path / "x" / "weights.bin")
    assert 4 * model.num_params() <= size < 4 * model.num_params() * 1.02
    graph = onnx.load(tmp_path / "x" / "decoder.onnx", load_external_data=False).graph
    assert {node.op_type for node in graph.node} >= {"GroupQueryAttention", "RotaryEmbedding", "SkipSimplifiedLayerNormalization"}
    assert not {node.op_type for node in graph.node} & {"If", "Loop", "Scan"}
    assert [value.name for value in graph.output] == ["logits", *(f"{part}_{i}" for i in range(model.config.n_dec) for part in ("key", "value"))]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_blocks_are_near(bits):
    """Every weight within half a step of its block's scale, also in the last block, which is not full."""
    weight = np.random.default_rng(0).standard_normal((24, 80)).astype(np.float32)
    packed, scales = export.quantize_blocks(weight, bits, 32)
    flat = packed.reshape(24, -1)
    codes = flat if bits == 8 else np.stack([flat & 15, flat >> 4], axis=-1).reshape(24, -1)
    found = ((codes.astype(np.float32) - 2 ** (bits - 1)).reshape(24, 3, 32) * scales[:, :, None]).reshape(24, -1)[:, :80]
    step = np.abs(scales).repeat(32, axis=1)[:, :80]
    assert (np.abs(found - weight) <= step * (1.01 if bits == 4 else 0.51)).all()  # 4 bits are lopsided: -8 to 7
    codes, scales = export.quantize_rows(weight)
    assert (np.abs(codes * scales[:, None] - weight) <= 0.51 * scales[:, None]).all()


@pytest.mark.parametrize("arch", ["encdec", "dec"])
@pytest.mark.parametrize("precision, size, near", [("fp16", 2, 0.01), ("int8", 1.5, 0.05), ("int4", 1.2, 0.5)])
def test_precisions(arch, precision, size, near, tmp_path):
    """Smaller files, logits near those of float32 in proportion to what was dropped, the output layer among it."""
    model = tiny(arch, n_embd=64, vocab_size=1000)
    twin = exported(model, tmp_path / "x", precision)
    assert os.path.getsize(tmp_path / "x" / "weights.bin") < 1.01 * size * model.num_params()
    a, b = step_by_step(model, twin, prompts_of(model, [5, 8]), 6)
    assert np.abs(a - b).mean() < near * np.abs(a).mean()


def test_pick():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]] * 4000, dtype=np.float32))
    rngs = [np.random.default_rng(b) for b in range(4000)]
    share = lambda **how: np.bincount(pick(logits, how.get("temperature", 1.0), how.get("top_k", 0), how.get("top_p", 1.0), rngs), minlength=4) / 4000
    np.testing.assert_allclose(share(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(share(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=0.7), [0.625, 0.375, 0, 0], atol=0.03)
    assert share(temperature=0.0).tolist() == [1, 0, 0, 0]


def static(model, folder, precision="fp32", src_len=24, tgt_len=200):
    rng = np.random.default_rng(5)
    draw = lambda *shape: rng.integers(3, model.config.vocab_size, shape)
    src, tgt = draw(6, src_len) if model.config.n_enc else None, draw(6, 90)
    export.write_static(model, str(folder), precision, "causal", src_len, tgt_len, (src, None, tgt, tgt > 0))
    return Static(str(folder), threads=2)


@pytest.mark.parametrize("arch", ["encdec", "dec"])
@pytest.mark.parametrize("name", CONFIGS)
def test_static_logits_are_those_of_torch(name, arch, tmp_path):
    """Sources shorter than the graph, up to its length and past the trained one; prompts of more than one chunk; an answer that fills the cache."""
    model = tiny(arch, **CONFIGS[name])
    twin = static(model, tmp_path / "x", src_len=40)
    for length, prefix, new in ((5, None, 12), (40, [[5, 6, 8]], 12), (1 if arch == "encdec" else 150, None, 200 if arch == "encdec" else 50)):
        a, b = step_by_step(model, twin, prompts_of(model, [length]), new, prefix)
        np.testing.assert_allclose(b, a, atol=2e-5 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("arch", ["encdec", "dec"])
@pytest.mark.parametrize("precision, near", [("16x8", 0.07), ("int8", 0.12)])
def test_static_codes(arch, precision, near, tmp_path):
    """Near in proportion to what was dropped, and of the form that was promised: ONNX's own operators, every size a number, every activation rounded,
    caches and memory stored as codes, and the weights once."""
    model = tiny(arch, vocab_size=1000)
    twin = static(model, tmp_path / "x", precision)
    a, b = step_by_step(model, twin, prompts_of(model, [20]), 30)
    assert np.abs(a - b).mean() < near * np.abs(a).mean()
    assert os.path.getsize(tmp_path / "x" / "weights.bin") < 1.02 * model.num_params()
    names = ["encoder", "decoder"] if arch == "encdec" else ["prefill", "decoder"]
    assert sorted(name for name in os.listdir(tmp_path / "x") if name.endswith(".onnx")) == sorted(f"{name}.onnx" for name in names)
    plain = {"Add", "Concat", "DequantizeLinear", "Div", "Gather", "Gemm", "MatMul", "Mul", "QuantizeLinear", "ReduceMean", "Reshape", "ScatterND", "Sigmoid", "Softmax",
             "Split", "Sqrt", "Sub", "Transpose"}
    codes = onnx.TensorProto.UINT8 if precision == "int8" else onnx.TensorProto.UINT16
    for name in names:
        graph = onnx.load(tmp_path / "x" / f"{name}.onnx", load_external_data=False).graph
        assert {node.op_type for node in graph.node} <= plain and {node.domain for node in graph.node} == {""}
        for value in (*graph.input, *graph.output):
            assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
            if value.name.startswith(("past_", "key_", "value_", "memory_")):
                assert value.type.tensor_type.elem_type == codes
        readers = {input: node.op_type for node in graph.node for input in node.input}
        for node in graph.node:
            if node.op_type in ("MatMul", "Gemm", "Add", "Mul", "Softmax", "Concat", "Div"):
                assert [readers[output] for output in node.output] == ["QuantizeLinear"]


def test_static_limits(tmp_path):
    model = tiny("encdec")
    twin = static(model, tmp_path / "x", src_len=10, tgt_len=8)
    assert list(twin.generate([[5] * 10], 8)) == list(model.generate([[5] * 10], 8))
    for prompts, new, message in (([[5] * 11], 8, "has 11 tokens, and this static export takes 10"), ([[5]], 9, "need 9 positions, and this static export has 8"),
                                  ([[5], [6]], 8, "one prompt at a time"), ([[99999]], 8, "outside the model's vocabulary")):
        with pytest.raises(UserError, match=message):
            next(twin.generate(prompts, new))


@pytest.fixture
def go(monkeypatch, capsys):
    return lambda main, *argv: call(main, argv, monkeypatch, capsys)


def test_rows_cut_for_a_static_export_keep_their_answers():
    tgt, mask = np.zeros((2, 40), np.int64), np.zeros((2, 40), bool)
    tgt[0], mask[0, 30:] = np.arange(1, 41), True
    tgt[1, :12], mask[1, 9:12] = np.arange(101, 113), True  # padding behind
    (_, _, cut, scored), prompts, new = export.fitting((None, None, tgt, mask), [[1, 2, 3]], 0, 10, 4)
    assert cut.tolist() == [list(range(31, 41)), list(range(103, 113))] and scored.sum(1).tolist() == [10, 3]
    (_, _, cut, scored), _, _ = export.fitting((None, None, tgt, mask), [[1]], 0, 100, 4)
    assert np.array_equal(cut, tgt) and np.array_equal(scored, mask)


@pytest.mark.parametrize("how", [(), ("--static",)])
@pytest.mark.parametrize("arch", [TINY_ENC, TINY_DEC])
def test_from_a_run_to_text_without_torch(arch, how, go, text_file, monkeypatch):
    """Train, export, and talk to the folder alone, in a process that cannot import torch: the answer that torch gives."""
    assert go(train.main, *arch, f"--data={text_file}", "--max_iters=4", "--out=run")[0] == 0
    status, out, err = go(export.main, "--run=run", "--out=folder", "--rows=3", "--new=12", "--json=report.json", *how)
    assert status == 0 and "100.0% of torch's greedy tokens" in out, out + err
    with open("report.json") as f:
        row = json.load(f)["rows"][0]
    assert row["logit_difference"] < 1e-3 and abs(row["loss_change"]) < 1e-4
    words = ["--prompt=abc de", "--max_new_tokens=12"]
    expected = go(sample.main, "--run=run", "--dtype=float32", "--device=cpu", *words)[1]
    code = f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {ROOT!r}); sys.argv = ['sample.py', '--run=folder', *{words!r}]; import sample; sample.main()"
    os.rename("run", "elsewhere")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.stdout == expected and expected.strip(), done.stderr
    if how:
        lengths = ["--src_len=5", "--tgt_len=7"] if arch is TINY_ENC else ["--tgt_len=7"]
        status, out, err = go(export.main, "--run=elsewhere", "--out=short", "--rows=3", "--precision=16x8", *how, *lengths)
        assert status == 0 and "of torch's greedy tokens" in out and "nan" not in out, out + err
        status, out, err = go(sample.main, "--run=short", "--prompt=abc")  # as many tokens as there is room for
        assert status == 0 and out.strip(), err
    status, out, err = go(sample.main, "--run=folder", *words, "--temperature=1", "--num_samples=2")
    assert "one prompt at a time" in one_line(err) if how else status == 0 and "-" * 80 in out
    for key in ("--beams=2", "--show_attention=a.png", "--dtype=bfloat16"):
        assert key.split("=")[0] in one_line(go(sample.main, "--run=folder", *words, key)[2])


def test_an_export_that_disagrees_fails(go, text_file, monkeypatch):
    go(train.main, *TINY_ENC, f"--data={text_file}", "--max_iters=2", "--out=run")
    monkeypatch.setattr(export, "array", lambda tensor: 1.01 * tensor.detach().float().numpy())
    status, _, err = go(export.main, "--run=run", "--out=folder", "--rows=2", "--new=4")
    assert status == 2 and "does not say what torch says" in one_line(err) and not os.path.exists("folder")


def test_bad_input(go, text_file, tmp_path):
    assert "no run" in one_line(go(export.main)[2])
    assert "run.json is missing" in one_line(go(export.main, "--run=nowhere")[2])
    os.mkdir("empty")
    assert "run.json is missing" in one_line(go(export.main, "--run=empty")[2])
    go(train.main, *TINY_DEC, f"--data={text_file}", "--max_iters=2", "--out=run")
    os.rename("run/model.safetensors", "model")
    assert "model.safetensors is missing" in one_line(go(export.main, "--run=run")[2])
    os.rename("model", "run/model.safetensors")
    assert "--precision" in one_line(go(export.main, "--run=run", "--precision=int3")[2])
    assert "--rows" in one_line(go(export.main, "--run=run", "--rows=0")[2])
    assert "--precision=16x8 is for --static" in one_line(go(export.main, "--run=run", "--precision=16x8")[2])
    assert "not int4" in one_line(go(export.main, "--run=run", "--precision=int4", "--static")[2])
    assert "--src_len is for --static" in one_line(go(export.main, "--run=run", "--src_len=9")[2])
    assert "has no encoder" in one_line(go(export.main, "--run=run", "--src_len=9", "--static")[2])
    assert "--tgt_len=0" in one_line(go(export.main, "--run=run", "--tgt_len=0", "--static")[2])
    assert "holds something else" in one_line(go(export.main, "--run=run", "--out=run")[2])
    assert go(export.main, "--run=run", "--rows=2", "--new=4", "--precision=int8")[0] == 0
    assert go(export.main, "--run=run", "--rows=2", "--new=4", "--precision=int8")[0] == 0  # once more, over the first
    for name in ("decoder.onnx", "weights.bin"):
        with open(f"run-int8/{name}", "rb") as f:
            whole = f.read()
        with open(f"run-int8/{name}", "wb") as f:
            f.write(whole[:len(whole) // 2])
        assert f"{name} has" in one_line(go(sample.main, "--run=run-int8", "--prompt=x")[2])
        os.remove(f"run-int8/{name}")
        assert f"{name} is missing" in one_line(go(sample.main, "--run=run-int8", "--prompt=x")[2])
        with open(f"run-int8/{name}", "wb") as f:
            f.write(whole)
    with open("run-int8/decoder.onnx", "r+b") as f:
        f.write(b"\xff" * 64)
    assert "cannot be loaded" in one_line(go(sample.main, "--run=run-int8", "--prompt=x")[2])
    with pytest.raises(UserError, match="is no export"):
        Exported("empty")
    model = tiny("dec")
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        next(exported(model, tmp_path / "x").generate([[99999]], 3))
    with pytest.raises(UserError, match="must be positive"):
        next(exported(model, tmp_path / "y").generate([[5]], 0))
