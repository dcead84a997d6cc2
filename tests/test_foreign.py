"""Weights of others: equal logits and equal greedy text, both ways; folders that cannot be used."""

import json
import os

import from_mu
import pytest
import to_hf
import torch
from conftest import call, one_line
from safetensors.torch import load_file, save_file
from test_data import foreign_bpe

import export
import sample
from data.tokenizer import load_tokenizer
from lib.runs import write_json
from lib.settings import read_json
from model import Config, Transformer

transformers = pytest.importorskip("transformers")
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, vocab_size=320)
TEXT = "the quick brown fox jumps over a lazy dog, def f(x): return x"


def make_tokenizer(folder, adds):
    names, foreign = dict(bos_token="<s>", eos_token="</s>"), foreign_bpe([TEXT], adds)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=foreign, **names)
    fast.save_pretrained(folder)
    return fast


def make_model(folder, kind, tied=False, **more):
    torch.manual_seed(0)
    ends = dict(bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied)
    about = transformers.AutoConfig.for_model(kind, **SIZES | dict(head_dim=8) | ends | more)
    model = transformers.AutoModelForCausalLM.from_config(about).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0 if p.ndim > 1 else 1.0, 0.2)
    shard = "2KB" if kind == "mistral" else "5GB"
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture
def run_export(monkeypatch, capsys):
    return lambda *argv: call(export.main, [*argv, "--threads=1"], monkeypatch, capsys)


@pytest.mark.parametrize(
    "kind, tied, more",
    [("llama", True, {}), ("llama", False, dict(rope_theta=5e5)), ("qwen2", True, {})]
    + [("mistral", False, dict(sliding_window=None)), ("qwen3", True, dict(head_dim=16))],
)
def test_equal_logits_and_greedy_text_both_ways(tmp_path, run_export, kind, tied, more):
    adds = kind not in ("qwen2", "qwen3")  # Qwen's own tokenizers put nothing in front
    theirs, tokenizer = make_model("theirs", kind, tied, **more), make_tokenizer("theirs", adds)
    status, _, err = run_export("--run=hf:theirs", "--format=run", "--out=ours")
    assert status == 0, err
    ours, words = Transformer.load("ours").eval(), load_tokenizer("ours")
    inputs = tokenizer(TEXT, return_tensors="pt").input_ids
    assert (ours.config.bos_id >= 0) == adds
    with torch.no_grad():
        wanted = theirs(inputs).logits
        got = ours.logits(ours.decode(inputs))[..., : wanted.size(-1)]
        assert torch.allclose(got, wanted, atol=1e-4), (got - wanted).abs().max()
        mask = dict(attention_mask=torch.ones_like(inputs))
        text = theirs.generate(inputs, max_new_tokens=12, do_sample=False, pad_token_id=1, **mask)
    answer = [new[0] for new in ours.generate([words.encode(TEXT)], 12)]
    assert answer == [i for i in text[0, inputs.size(1) :].tolist() if i != 1]
    to_hf.write_hf("ours", "back")
    again = transformers.AutoModelForCausalLM.from_pretrained("back").eval()
    with torch.no_grad():
        logits = again(inputs).logits[..., : wanted.size(-1)]
    assert torch.allclose(logits, wanted, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained("back")(TEXT).input_ids == inputs[0].tolist()


def test_a_run_of_ours_leaves_with_equal_logits(monkeypatch, capsys):
    torch.manual_seed(0)
    words = load_tokenizer("bytes")
    ids = dict(pad_id=words.pad, bos_id=words.bos, eos_id=words.eos, vocab_size=words.vocab_size)
    sizes = dict(n_enc=0, src_len=0, n_dec=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16)
    model = Transformer(Config(**sizes, **ids)).eval()  # QK-norm and biases: Qwen3's class
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0 if p.ndim > 1 else 1.0, 0.1)
    model.save("run")
    words.save("run")
    write_json("run/run.json", dict(settings=dict(objective="causal")))
    status, _, err = call(to_hf.main, ["--run=run", "--out=hf"], monkeypatch, capsys)
    assert status == 0, err
    again = transformers.AutoModelForCausalLM.from_pretrained("hf").eval()
    inputs = torch.tensor([[words.bos, *TEXT.encode()]])
    with torch.no_grad():
        assert torch.allclose(again(inputs).logits, model.logits(model.decode(inputs)), atol=1e-3)


def test_as_an_encoder_decoder(run_export, monkeypatch, capsys):
    make_model("theirs", "llama", True)
    make_tokenizer("theirs", True)
    words = "--run=hf:theirs --format=run --out=ours --n_enc=3 --n_dec=2".split()
    status, _, err = run_export(*words)
    assert status == 0, err
    model, old = Transformer.load("ours"), load_file("theirs/model.safetensors")
    assert (len(model.enc), len(model.dec)) == (3, 2)
    for name in ("enc.2.attn.wq.weight", "dec.1.attn.wq.weight", "dec.1.cross.wq.weight"):
        assert torch.equal(model.get_parameter(name), old["model.layers.2.self_attn.q_proj.weight"])
    argv = ["--run=ours", "--prompt=a fox", "--max_new_tokens=3", "--device=cpu"]
    assert call(sample.main, argv, monkeypatch, capsys)[0] == 0


def test_the_papers_checkpoint(monkeypatch, capsys):
    """Its heads stand in another order: written so, and read back into ours."""
    make_model("theirs", "llama", True, vocab_size=700)
    make_tokenizer("theirs", True)
    torch.manual_seed(0)
    sizes = dict(n_enc=2, n_dec=1, n_embd=32, n_head=4, n_kv_head=2, head_dim=8, n_hidden=48)
    dialect = dict(mlp="gelu", bias="all", qk_norm=False, src_len=64, tgt_len=64, bos_id=0)
    model = Transformer(Config(vocab_size=700, **sizes, **dialect)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.2)
    model.embed_scale.fill_(1.0)
    order, state = torch.arange(4).view(2, 2).T.flatten().argsort(), {}
    for ours, p in model.named_parameters():
        p = p.detach()
        if ".wq." in ours:
            p = p.unflatten(0, (4, -1))[order].flatten(0, 1)
        elif ours.endswith("wo.weight"):
            p = p.unflatten(1, (4, -1))[:, order].flatten(1)
        state["_orig_mod." + from_mu.mu_names(2, 1)[ours]] = p.clone()
    # The factor changes texts longer than the block alone.
    about = dict(n_head=4, n_kv_head=2, block_size=64, rope_factor=2)
    torch.save(dict(model_state_dict=state, model_config=about), "mu.pt")
    argv = ["--out=ours", "--tokenizer=theirs/tokenizer.json"]

    def convert(path):
        return call(from_mu.main, [f"--file={path}", *argv], monkeypatch, capsys)[::2]

    torch.save(Code(), "code.pt")
    for path, word in (("code.pt", "refused"), ("gone.pt", "missing")):
        status, err = convert(path)
        assert status == 2 and word in one_line(err) and not os.path.exists("ran")
    assert convert("mu.pt")[0] == 0
    again = Transformer.load("ours").eval()
    assert again.config.bos_id == 0
    src, tgt = torch.arange(20, 30)[None], torch.arange(40, 46)[None]
    with torch.no_grad():
        assert torch.allclose(model.states(src, tgt), again.states(src, tgt), atol=1e-5)


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_folders_of_strangers(run_export):
    make_model("theirs", "llama", True)
    make_tokenizer("theirs", True)
    about = read_json("theirs/config.json")
    index = "theirs/model.safetensors.index.json"

    def refused(run="hf:theirs"):
        argv = [f"--run={run}", "--format=run", "--out=x", "--tokenizer=theirs/tokenizer.json"]
        status, _, err = run_export(*argv)
        assert status == 2 and not os.path.exists("x"), err
        return one_line(err)

    def put(text, path="theirs/config.json"):
        with open(path, "w") as file:
            file.write(text if type(text) is str else json.dumps(text))

    for change, says in (
        (dict(num_hidden_layers=10**9), "num_hidden_layers|n_dec"),
        (dict(vocab_size=10**6), "embed.weight"),
        (dict(model_type="gpt2"), "--teacher=hf:"),
        (dict(rope_scaling=dict(type="yarn"), rope_parameters=None), "rope_type=yarn"),
        (dict(hidden_act="gelu"), "hidden_act=gelu"),
    ):
        put(about | change)
        assert any(word in refused() for word in says.split("|")), change
    put(about)
    put(dict(weight_map={"a": "../outside.safetensors"}), index)
    assert "index" in refused()
    os.remove(index)
    save_file({"x": torch.ones(100000)}, "theirs/model.safetensors")
    assert "do not fit" in refused() and "no such folder" in refused("hf:./gone")
