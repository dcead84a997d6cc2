"""Weights from elsewhere and back: `transformers` is the oracle for the Llama family, plain code for the paper's released model. Everything random, everything through files."""
import json
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Foreign
from tokenizers import decoders, models, pre_tokenizers, trainers

import bench
import export
import sample
import train
from conftest import TINY_DEC, TINY_ENC, call, one_line
from lib.settings import UserError
from lib.runtime import Exported
from lib.runs import read_record
from data.tokenizer import Tokenizer, load_tokenizer, merges_of, train_tokenizer
from model import ModelError
from vision import load_model

SMALL = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
LARGER = dict(vocab_size=500, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
              bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1 + i / 10 for i in range(8)], long_factor=[1.5 + i for i in range(8)])
KINDS = {
    "llama": ("Llama", {}), "llama, tied": ("Llama", dict(tie_word_embeddings=True)), "llama, linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)), "mistral": ("Mistral", {}), "qwen2": ("Qwen2", {}), "qwen2, tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=24)), "phi3": ("Phi3", {}), "phi3, long": ("Phi3", dict(rope_parameters=LONG, original_max_position_embeddings=32)),
}


def foreign_model(kind, sizes=SMALL, seed=0, **changes):
    """A random model of `transformers`, no weight of which is at a value that could hide a mistake."""
    name, own = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**sizes | own | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(p, mean=1.0 * ("norm" in key), std=0.3)
    return model


def saved(model, folder, **how):
    model.save_pretrained(folder, **how)
    return f"hf:{folder}"


def add_tokenizer(folder, vocab_size=320):
    """A byte-level tokenizer.json of at most so many ids, as Llama 3's are written."""
    foreign = Foreign(models.BPE())
    foreign.pre_tokenizer, foreign.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    foreign.train_from_iterator(["some words of a small text, some more words and numbers 123"] * 3,
                                trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    foreign.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(dict(bos_token="<s>", eos_token="</s>"), f)
    return foreign.get_vocab_size()


def logits_of(model, ids):
    with torch.no_grad():
        return model.logits(model.decode(ids))


def change(folder, **values):
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        about = json.load(f)
    about |= values
    with open(path, "w") as f:
        json.dump({key: value for key, value in about.items() if value is not None}, f)


# --- the Llama family

@pytest.mark.parametrize("sizes", [SMALL, LARGER], ids=["small", "larger"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_llama_family(kind, sizes, tmp_path):
    """Equal logits at lengths on both sides of what RoPE kinds look at, and the same greedy text with the cache."""
    theirs = foreign_model(kind, sizes)
    ours = export.load_foreign(saved(theirs, tmp_path / "m")).eval()
    for length in (5, 31, 60):
        ids = torch.randint(3, sizes["vocab_size"], (2, length))
        with torch.no_grad():
            assert (theirs(ids).logits - logits_of(ours, ids)).abs().max() < 1e-4
    prompt = [5, 9, 77]
    wanted = theirs.generate(torch.tensor([[1, *prompt]]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    ours.config.eos_id = -1
    assert [step[0] for step in ours.generate([prompt], 20)] == wanted


@pytest.mark.parametrize("kind", ["llama", "llama3", "phi3, long"])
def test_configs_of_transformers_4(kind, tmp_path):
    theirs = foreign_model(kind)
    name = saved(theirs, tmp_path / "m")
    rope = dict(theirs.config.rope_parameters)
    theta, kept = rope.pop("rope_theta"), {key: value for key, value in rope.items() if key not in ("partial_rotary_factor", "original_max_position_embeddings") or kind == "llama3"}
    change(tmp_path / "m", rope_parameters=None, rope_theta=theta, rope_scaling=None if kind == "llama" else kept)
    ids = torch.randint(3, 320, (1, 60))
    with torch.no_grad():
        assert (theirs(ids).logits - logits_of(export.load_foreign(name), ids)).abs().max() < 1e-4


def test_a_row_past_the_trained_length_has_the_long_factors(tmp_path):
    """A request that may reach past it uses them from its first token on."""
    ours = export.load_foreign(saved(foreign_model("phi3, long"), tmp_path / "m")).eval()
    assert ours.config.tgt_len == 32 and ours.config.rope_scale == pytest.approx(math.sqrt(1 + math.log(2) / math.log(32)))
    ours.config.eos_id = -1
    prompts = [[5, 9, 77], list(range(3, 33))]
    apart = [[step[0] for step in ours.generate([prompt], 20)] for prompt in prompts]
    assert [list(row) for row in zip(*ours.generate(prompts, 20))] == apart


def test_shards_dtypes_and_what_belongs_to_no_weight(tmp_path):
    name = saved(foreign_model("llama").to(torch.bfloat16), tmp_path / "m", max_shard_size="100KB")
    theirs = foreign_model("llama")  # whose RoPE is not rounded
    theirs.load_state_dict({key: p.bfloat16().float() for key, p in theirs.state_dict().items()})
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    ours = export.load_foreign(name)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ids = torch.randint(3, 320, (1, 9))
    with torch.no_grad():
        assert (theirs(ids).logits - logits_of(ours.float(), ids)).abs().max() < 1e-4
    plain = saved(foreign_model("llama, tied"), tmp_path / "n")
    tensors = load_file(tmp_path / "n" / "model.safetensors")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | more, tmp_path / "n" / "model.safetensors", metadata=dict(format="pt"))
    assert export.load_foreign(plain).head is None


def broken(tmp_path, kind="llama"):
    saved(foreign_model(kind), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    return path, load_file(path)


@pytest.mark.parametrize("values, said", [
    (dict(model_type="gemma3"), "model_type gemma3; supported are llama, mistral, qwen2, qwen3, phi3"), (dict(model_type=None), "model_type None"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=2)), "RoPE of the kind yarn; supported are default, linear, llama3, longrope"),
    (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor"), (dict(hidden_act="gelu"), "hidden_act gelu"),
    (dict(mlp_bias=True), "mlp_bias"), (dict(quantization_config=dict(bits=4)), "quantized"), (dict(hidden_size=None), "lacks hidden_size"), (dict(hidden_size="wide"), "cannot be used"),
    (dict(num_hidden_layers=4), "lacks the weights model.layers.3."), (dict(num_hidden_layers=2), "9 weights that its configuration has no place for, the first is model.layers.2."),
    (dict(intermediate_size=80), "gives (96, 64) for dec.0.mlp"), (dict(num_attention_heads=3), "n_head=3 is not a multiple"),
])
def test_configs_that_do_not_fit(values, said, tmp_path):
    broken(tmp_path)
    change(tmp_path / "m", **values)
    with pytest.raises((UserError, ModelError), match=said.replace("(", r"\(").replace(")", r"\)")):
        export.load_foreign(f"hf:{tmp_path / 'm'}")


def test_weights_that_do_not_fit(tmp_path):
    path, tensors = broken(tmp_path)
    name = f"hf:{tmp_path / 'm'}"
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({k: t for k, t in tensors.items() if k != key}, path)
    with pytest.raises(UserError, match=f"lacks the weights {key}"):
        export.load_foreign(name)
    save_file(tensors | {"model.layers.0.self_attn.sinks": torch.ones(3)}, path)
    with pytest.raises(UserError, match="1 weights .* the first is model.layers.0.self_attn.sinks"):
        export.load_foreign(name)
    bad = {k: t.half() for k, t in tensors.items()}
    bad[key] = bad[key].clone()
    bad[key][3, 4] = math.inf
    save_file(bad, path)
    with pytest.raises(UserError, match=f"{key} holds infinities .* too large for float16"):
        export.load_foreign(name)
    bad[key][5, 4] = -math.inf  # which a sum would not show as infinite
    save_file(bad, path)
    with pytest.raises(UserError, match="holds infinities"):
        export.load_foreign(name)
    save_file({k: t.half() for k, t in tensors.items()}, path)
    assert export.load_foreign(name).embed.weight.dtype == torch.float16
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        export.load_foreign(name)
    path.unlink()
    with pytest.raises(UserError, match="no .safetensors file"):
        export.load_foreign(name)
    with pytest.raises(UserError, match="no such folder"):
        export.load_foreign("hf:./nowhere")
    saved(foreign_model("llama"), tmp_path / "s", max_shard_size="100KB")
    sorted((tmp_path / "s").glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match="shards is missing, the first is model-00002"):
        export.load_foreign(f"hf:{tmp_path / 's'}")


def test_ids_without_an_embedding_are_never_chosen(tmp_path):
    """The special ids of this project stand behind the tokenizer's; what others trained says the same as before."""
    for kind in ("llama", "llama, tied"):
        folder = tmp_path / kind
        theirs = foreign_model(kind)
        name = saved(theirs, folder)
        n = add_tokenizer(folder)
        tokenizer = load_tokenizer(str(folder))
        assert (tokenizer.n_text, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (n, 1, 2, n)
        ours = export.fit_vocabulary(export.load_foreign(name), tokenizer, name)
        assert ours.config.vocab_size == ours.embed.weight.size(0) == tokenizer.vocab_size > 320 and ours.config.pad_id == n
        ids = torch.randint(3, 320, (3, 50))
        with torch.no_grad():
            logits = logits_of(ours, ids)
            assert (theirs(ids).logits - logits[..., :320]).abs().max() < 1e-4
        assert torch.allclose(logits[..., 320:], logits[..., :320].mean(-1, keepdim=True), atol=1e-4) and logits.argmax(-1).max() < 320


def test_a_tokenizer_of_more_ids_than_embeddings(tmp_path):
    name = saved(foreign_model("llama", SMALL | dict(vocab_size=200)), tmp_path / "m")
    n = add_tokenizer(tmp_path / "m")
    with pytest.raises(UserError, match=f"tokenizer has {n} ids and its embedding 200 rows"):
        export.fit_vocabulary(export.load_foreign(name), load_tokenizer(str(tmp_path / "m")), name)


# --- through the scripts

def short(*words):
    """A short training run that goes on from something, without the sizes of a new model."""
    return [word for word in TINY_DEC if not word.startswith(("--tokenizer", "--n_", "--head_dim", "--arch"))] + ["--max_iters=3", "--eval_interval=3", *words]


def test_a_foreign_model_as_a_run(tmp_path, text_file, monkeypatch, capsys):
    theirs = foreign_model("qwen2, tied")
    name = saved(theirs, tmp_path / "m")
    add_tokenizer(tmp_path / "m")
    status, out, err = call(export.main, [f"--run={name}", "--format=run", "--out=run"], monkeypatch, capsys)
    assert status == 0, err
    status, out, err = call(sample.main, ["--run=run", "--prompt=some words", "--max_new_tokens=12", "--temperature=0"], monkeypatch, capsys)
    ids = [1, *load_tokenizer("run").encode("some words")]
    wanted = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids):].tolist()
    assert status == 0 and load_tokenizer("run").decode(wanted).strip() in out
    status, out, err = call(export.main, ["--run=run", "--out=onnx", f"--data={text_file}", "--rows=2", "--new=4", "--threads=1"], monkeypatch, capsys)
    assert status == 0 and "100.0% of torch's greedy tokens" in out, err
    status, out, err = call(bench.main, ["quality", "--run=run", f"--data={text_file}", "--eval_rows=2"], monkeypatch, capsys)
    assert status == 0, err
    status, out, err = call(train.main, short("--init_from=run", f"--data={text_file}", "--out=more"), monkeypatch, capsys)
    assert status == 0, err
    assert load_model("more").config.tgt_len == 64 and read_record("more")["weights_of"] == name  # what others trained for stays, a run's run later too
    status, out, err = call(export.main, ["--run=more", "--format=hf"], monkeypatch, capsys)
    assert status == 0, err
    text, tokenizer = transformers.AutoTokenizer.from_pretrained("more-hf"), load_tokenizer("more")
    assert text("some words<sep>")["input_ids"] == [1, *tokenizer.encode("some words"), tokenizer.sep] and text.pad_token_id == tokenizer.pad


@pytest.mark.parametrize("arch", ["dec", "encdec"])
def test_training_goes_on_from_a_foreign_model(arch, tmp_path, text_file, monkeypatch, capsys):
    name = saved(foreign_model("qwen3"), tmp_path / "m")
    add_tokenizer(tmp_path / "m")
    more = ["--arch=encdec", "--n_enc=2", "--objective=ul2"] if arch == "encdec" else []
    status, out, err = call(train.main, short(f"--init_from={name}", f"--data={text_file}", "--out=run", *more), monkeypatch, capsys)
    assert status == 0, err
    model = load_model("run")
    assert (model.config.n_enc, model.config.n_dec, model.config.tgt_len) == ((2, 3, 64) if arch == "encdec" else (0, 3, 64))
    shutil.rmtree(tmp_path / "m")  # the run has all it needs
    status, out, err = call(train.main, ["--init_from=resume", "--out=run", "--max_iters=5"], monkeypatch, capsys)
    assert status == 0, err


@pytest.mark.parametrize("words, said", [
    (["--init_from=hf:m", "--n_embd=48"], "--n_embd=48 cannot be chosen"), (["--init_from=hf:m", "--arch=encdec", "--n_enc=9"], "--n_enc=9: the model to start from has 3 layers"),
    (["--init_from=hf:m", "--n_dec=2"], "--n_dec=2 cannot be chosen"), (["--init_from=hf:nowhere"], "no such folder"), (["--init_from=hf:bare"], "no tokenizer.json beside it"),
    (["--init_from=mu:x.pt"], "x.pt is missing"), (["--init_from=hf:m", "--tokenizer=bytes"], "is not the one beside the weights"), (["--init_from=hf:bare", "--tokenizer=bytes"], "not of one of this"),
    (["--init_from=hf:m", "--arch=encdec", "--split=1/3"], "--split=1/3 is for a new model"), (["--init_from=mu:m"], "has pictures: make it a run first"),
    (["--init_from=hf:bare", "--tokenizer=m/tokenizer.json"], "names no end of sequence"),
])
def test_what_cannot_be_started_from(words, said, tmp_path, text_file, monkeypatch, capsys):
    saved(foreign_model("llama"), "m")
    shutil.copytree("m", "bare")
    add_tokenizer("m")
    if words[-1].endswith("m/tokenizer.json"):
        os.remove("m/tokenizer_config.json")
        change("m", eos_token_id=None)
    status, out, err = call(train.main, short(*words, f"--data={text_file}"), monkeypatch, capsys)
    assert status == 2 and said in one_line(err)


# --- decoder-only -> encoder-decoder

def test_adaptation_takes_each_weight_from_its_place(tmp_path):
    model = export.load_foreign(saved(foreign_model("qwen3", SMALL | dict(num_hidden_layers=5)), tmp_path / "m"))
    new = export.to_encdec(model, 3, 2)
    old = model.state_dict()
    for i, layer in enumerate((0, 2, 4)):
        for name, p in new.enc[i].state_dict().items():
            assert torch.equal(p, old[f"dec.{layer}.{name}"])
    for i, layer in enumerate((0, 4)):
        for name, p in new.dec[i].state_dict().items():
            assert torch.equal(p, old[f"dec.{layer}.{name.replace('cross', 'attn')}"])
    assert torch.equal(new.enc_norm.weight, old["dec_norm.weight"]) and torch.equal(new.head.weight, old["head.weight"])
    new.dec[0].attn.wq.weight.data.zero_()
    assert model.dec[0].attn.wq.weight.any()  # a copy


def test_a_run_of_ours_becomes_an_encoder_decoder(tmp_path, text_file, monkeypatch, capsys):
    status, out, err = call(train.main, [*TINY_DEC, "--max_iters=3", f"--data={text_file}", "--out=dec"], monkeypatch, capsys)
    assert status == 0, err
    status, out, err = call(train.main, short("--init_from=dec", "--arch=encdec", "--n_enc=1", f"--data={text_file}", "--out=both"), monkeypatch, capsys)
    assert status == 0, err
    config = load_model("both").config
    assert (config.n_enc, config.n_dec, config.n_hidden, config.src_len, config.tgt_len) == (1, 2, 48, 32, 16)
    status, out, err = call(train.main, short("--init_from=both", "--arch=dec", f"--data={text_file}"), monkeypatch, capsys)
    assert status == 2 and "is an encoder-decoder" in one_line(err)


# --- the paper's released model

class Mu:
    """The computation of the released code in its plainest form, one row at a time, by its names of the weights: float64, no cache, whole-block repetition of the key-value heads."""

    def __init__(self, tensors, n_head, n_kv_head, whole_blocks=True):
        self.t = {key: tensor.double() for key, tensor in tensors.items()}
        self.n_head, self.n_kv_head, self.whole_blocks = n_head, n_kv_head, whole_blocks

    def linear(self, x, name):
        return x @ self.t[name + ".weight"].T + self.t[name + ".bias"]

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.t[name + ".weight"]

    def attention(self, x, source, name, causal, rotary):
        q, k, v = (self.linear(y, f"{name}.{part}_linear") for y, part in ((x, "q"), (source, "k"), (source, "v")))
        D = q.shape[-1] // self.n_head
        heads = []
        for h in range(self.n_head):
            g = h % self.n_kv_head if self.whole_blocks else h // (self.n_head // self.n_kv_head)
            qh, kh, vh = q[:, h * D:(h + 1) * D], k[:, g * D:(g + 1) * D], v[:, g * D:(g + 1) * D]
            if rotary:
                qh, kh = self.rotated(qh), self.rotated(kh)
            scores = qh @ kh.T / math.sqrt(D)
            if causal:
                scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ vh)
        return self.linear(torch.cat(heads, -1), f"{name}.out_linear")

    def rotated(self, x):
        half = x.shape[1] // 2
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def mlp(self, x, name):
        return self.linear(F.gelu(self.linear(x, name + ".fc1"), approximate="tanh"), name + ".fc2")

    def layers(self, stack):
        return range(1 + max(int(key.split(".")[2]) for key in self.t if key.startswith(f"transformer.{stack}.")))

    def encode(self, ids):
        x = self.t["transformer.wte.weight"][torch.tensor(ids)]
        for i in self.layers("e"):
            name = f"transformer.e.{i}"
            h = self.norm(x, f"{name}.ln1")
            x = x + self.attention(h, h, f"{name}.attn", False, True)
            x = x + self.mlp(self.norm(x, f"{name}.ln2"), f"{name}.mlp")
        return self.norm(x, "transformer.ln_e")

    def logits(self, ids, encoded):
        x = self.t["transformer.wte.weight"][torch.tensor(ids)]
        for i in self.layers("h"):
            name = f"transformer.h.{i}"
            h = self.norm(x, f"{name}.ln1")
            x = x + self.attention(h, h, f"{name}.causal_attn", True, True)
            x = x + self.attention(self.norm(x, f"{name}.ln2"), encoded, f"{name}.cross_attn", False, False)
            x = x + self.mlp(self.norm(x, f"{name}.ln3"), f"{name}.mlp")
        return self.norm(x, "transformer.ln_f") @ self.t["transformer.wte.weight"].T + self.t.get("lm_head.bias", 0)


def mu_state(n_enc=3, n_dec=2, n_embd=64, n_head=6, n_kv_head=3, head_dim=8, n_hidden=96, vocab=320, seed=0):
    """Random weights under the names of the released code."""
    g, tensors = torch.Generator().manual_seed(seed), {}

    def new(name, *shape, mean=0.0, std=0.2):
        tensors[name] = mean + std * torch.randn(*shape, generator=g)

    def linear(name, n_in, n_out):
        new(f"{name}.weight", n_out, n_in)
        new(f"{name}.bias", n_out)
    new("transformer.wte.weight", vocab, n_embd)
    for stack, n, parts in (("e", n_enc, ["attn"]), ("h", n_dec, ["causal_attn", "cross_attn"])):
        for i in range(n):
            name = f"transformer.{stack}.{i}"
            for k in range(len(parts) + 1):
                new(f"{name}.ln{k + 1}.weight", n_embd, mean=1.0)
            for part in parts:
                linear(f"{name}.{part}.q_linear", n_embd, n_head * head_dim)
                linear(f"{name}.{part}.k_linear", n_embd, n_kv_head * head_dim)
                linear(f"{name}.{part}.v_linear", n_embd, n_kv_head * head_dim)
                linear(f"{name}.{part}.out_linear", n_head * head_dim, n_embd)
            linear(f"{name}.mlp.fc1", n_embd, n_hidden)
            linear(f"{name}.mlp.fc2", n_hidden, n_embd)
    new("transformer.ln_e.weight", n_embd, mean=1.0)
    new("transformer.ln_f.weight", n_embd, mean=1.0)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return tensors


def agrees(model, oracle, vocab=320):
    torch.manual_seed(0)
    for n, m in ((1, 1), (7, 5), (40, 12)):
        src, tgt = torch.randint(3, vocab, (n,)).tolist(), [1, *torch.randint(3, vocab, (m - 1,)).tolist()]
        with torch.no_grad():
            encoded = model.encode(torch.tensor([src]))
            logits = model.logits(model.decode(torch.tensor([tgt]), encoded))
        assert (encoded[0] - oracle.encode(src)).abs().max() < 1e-4
        assert (logits[0, :, :vocab] - oracle.logits(tgt, oracle.encode(src))).abs().max() < 1e-3
    eos, model.config.eos_id = model.config.eos_id, -1
    prompts = [torch.randint(3, vocab, (n,)).tolist() for n in (3, 20)]
    found = list(zip(*model.generate(prompts, 8)))
    model.config.eos_id = eos
    for prompt, answer in zip(prompts, found):
        text, encoded = [1], oracle.encode(prompt)
        for _ in range(8):
            text.append(int(oracle.logits(text, encoded)[-1].argmax()))
        assert list(answer) == text[1:]


@pytest.mark.parametrize("config", [None, dict(n_head=4, n_kv_head=2, block_size=256, rope_theta=10000, is_interleaved=False), dict(n_head=4, n_kv_head=2, is_interleaved=True)],
                         ids=["bare", "with its sizes", "interleaved"])
def test_the_released_checkpoint(config, tmp_path):
    """Encoder states, logits and greedy text are those of the plain computation; bfloat16 on disk, as it was released, gives bfloat16 here."""
    heads = (config["n_head"], config["n_kv_head"]) if config else (6, 3)
    state = mu_state(n_head=heads[0], n_kv_head=heads[1])
    torch.save(dict(model_state_dict=state) | (dict(model_config=config) if config else {}), tmp_path / "m.pt")
    model = export.load_foreign(f"mu:{tmp_path / 'm.pt'}").eval()
    assert (model.config.mlp, model.config.n_enc, model.config.n_dec, model.config.src_len) == ("gelu", 3, 2, (config or {}).get("block_size", 1024))
    agrees(model, Mu(state, *heads, whole_blocks=not (config or {}).get("is_interleaved")))
    torch.save(dict(model_state_dict={key: tensor.bfloat16() for key, tensor in state.items()}), tmp_path / "b.pt")
    if not config:
        assert export.load_foreign(f"mu:{tmp_path / 'b.pt'}").embed.weight.dtype == torch.bfloat16


def test_the_released_checkpoint_becomes_a_run(tmp_path, text_file, monkeypatch, capsys):
    """... which is exported, in int8 too, and trained on."""
    state = mu_state()
    torch.save(dict(model_state_dict=state), "m.pt")
    os.mkdir("t")
    add_tokenizer("t", 300)
    status, out, err = call(export.main, ["--run=mu:m.pt", "--format=run", "--out=run", "--tokenizer=t"], monkeypatch, capsys)
    assert status == 0, err
    model = load_model("run").eval()
    agrees(model, Mu(state, 6, 3))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(source=f"some words {i}", target=f"more {i}")) + "\n" for i in range(40)))
    for precision in ("fp32", "int8"):
        status, out, err = call(export.main, ["--run=run", f"--precision={precision}", f"--data={text_file}", "--rows=2", "--new=4", "--threads=1"], monkeypatch, capsys)
        assert status == 0, err
    twin, prompt = Exported("run-fp32", 1), [5, 9, 200]
    _, logits = twin.start([prompt], 2)
    assert abs(logits[0, :320] - Mu(state, 6, 3).logits([1], Mu(state, 6, 3).encode(prompt))[-1].numpy()).max() < 1e-3
    status, out, err = call(train.main, short("--init_from=mu:m.pt", "--tokenizer=t", f"--data={rows}", "--objective=seq2seq", "--out=more"), monkeypatch, capsys)
    assert status == 0, err


@pytest.mark.slow
def test_the_released_checkpoint_at_its_size(tmp_path, text_file, monkeypatch, capsys):
    """20 + 10 layers, width 1024, bfloat16, as it was published but for what it knows: a run of it, and an int8 export whose greedy text is torch's."""
    state = mu_state(n_enc=20, n_dec=10, n_embd=1024, head_dim=64, n_hidden=4096, vocab=32128)
    torch.save(dict(model_state_dict={key: (tensor * (1 if tensor.ndim == 1 else 5 * tensor.shape[1] ** -0.5)).bfloat16() for key, tensor in state.items()}), "m.pt")
    os.mkdir("t")
    add_tokenizer("t", 300)
    status, out, err = call(export.main, ["--run=mu:m.pt", "--format=run", "--out=run", "--tokenizer=t"], monkeypatch, capsys)
    assert status == 0 and "332,0" in out, err
    status, out, err = call(export.main, ["--run=run", "--precision=int8", f"--data={text_file}", "--rows=2", "--new=16"], monkeypatch, capsys)
    assert status == 0, err
    print(out)


def test_checkpoints_that_are_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, ("touch ran",)
    torch.save(dict(model_state_dict=Code()), "bad.pt")
    with pytest.raises(UserError, match="asks for code to be run .* refused"):
        export.load_foreign("mu:bad.pt")
    assert not os.path.exists("ran")
    os.mkdir("folder")
    torch.save([1, 2], "folder/pytorch_model.bin")
    with open("folder/config.json", "w") as f:
        json.dump(dict(n_head=4, n_kv_head=2), f)
    with pytest.raises(UserError, match="no model of the paper's code"):
        export.load_foreign("mu:folder")
    torch.save(dict(weights={}), "other.pt")
    with pytest.raises(UserError, match="no model_state_dict"):
        export.load_foreign("mu:other.pt")
    state = mu_state()
    torch.save(dict(model_state_dict={key: tensor for key, tensor in state.items() if "cross_attn.k_linear.bias" not in key}), "less.pt")
    with pytest.raises(UserError, match="lacks the weights transformer.h.0.cross_attn.k_linear.bias"):
        export.load_foreign("mu:less.pt")
    torch.save(dict(model_state_dict=state | {"transformer.h.0.gate": torch.ones(2)}), "more.pt")
    with pytest.raises(UserError, match="no place for, the first is transformer.h.0.gate"):
        export.load_foreign("mu:more.pt")
    torch.save(dict(model_state_dict=state | {"lm_head.weight": torch.ones(320, 64)}), "untied.pt")
    with pytest.raises(UserError, match="its output layer is not its embedding"):
        export.load_foreign("mu:untied.pt")
    with open("more.pt", "rb") as f, open("cut.pt", "wb") as g:
        g.write(f.read()[:5000])
    with pytest.raises(UserError, match="truncated or not written by torch.save"):
        export.load_foreign("mu:cut.pt")


def test_the_released_model_with_pictures(tmp_path, monkeypatch, capsys):
    """A folder in LLaVA's style: tower, projector, end of a row, an output layer with a bias; heads in the usual order."""
    from PIL import Image

    from data.images import prepare_image
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1, image_size=28, patch_size=14)).eval()
    state = mu_state(n_head=4, n_kv_head=2)
    generator = torch.Generator().manual_seed(1)
    state["lm_head.bias"] = torch.randn(320, generator=generator)
    prefix = "" if any(key.startswith("vision_model.") for key in clip.state_dict()) else "vision_model."
    eyes = {f"vision_tower.vision_tower.{prefix}{key}": tensor for key, tensor in clip.state_dict().items()}
    eyes |= {f"mm_projector.{i}.{part}": 0.2 * torch.randn(*shape, generator=generator) for i in (0, 2) for part, shape in (("weight", (64, 64)), ("bias", (64,)))}
    eyes["image_newline"] = torch.randn(64, generator=generator)
    os.mkdir("m")
    torch.save(state | eyes, "m/pytorch_model.bin")
    with open("m/config.json", "w") as f:
        json.dump(dict(model_type="llava_mu", n_head=4, n_kv_head=2, block_size=512, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2), f)
    add_tokenizer("m", 300)
    status, out, err = call(export.main, ["--run=mu:m", "--format=run", "--out=run"], monkeypatch, capsys)
    assert status == 0, err
    model, tokenizer = load_model("run").eval(), load_tokenizer("run")
    agrees(model, Mu(state, 4, 2, whole_blocks=False))
    assert model.config.image_id == tokenizer.image and model.vision.image_size == 28
    picture = Image.effect_noise((28, 28), 80).convert("RGB")
    prepared = prepare_image(picture, model.vision)
    tokens, _ = model.see([prepared])
    pixels = (torch.tensor(prepared.tiles[:1]).float() / 255 - torch.tensor(model.vision.mean)) / torch.tensor(model.vision.std)
    with torch.no_grad():
        features = clip(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2][0, 1:]
    expected = F.linear(F.gelu(F.linear(features, eyes["mm_projector.0.weight"], eyes["mm_projector.0.bias"])), eyes["mm_projector.2.weight"], eyes["mm_projector.2.bias"])
    assert (tokens[:4] - expected).abs().max() < 1e-4
    assert torch.equal(model.embed_marker, eyes["image_newline"])


# --- out again

@pytest.mark.parametrize("changes", [dict(qk_norm=False), dict(qk_norm=False, tied=False), dict(qk_norm=False, qkv_bias=True), dict(), dict(qkv_bias=True, embed_scale=3.0),
                                     dict(qk_norm=False, embed_scale=3.0), dict(qk_norm=False, rope_factors=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], rope_scale=1.1)], ids=str)
def test_a_run_for_transformers(changes, tmp_path, monkeypatch):
    """Loaded by `transformers`: equal logits, the same greedy text, and the folder comes back as the same model."""
    from test_distill import some_model
    model = some_model(**changes)
    for key, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3) if key.endswith("bias") else None
    tokenizer = Tokenizer("bytes")
    export.write_hf(model, tokenizer, str(tmp_path / "hf"), "run", dict(settings=dict(data="text", objective="causal")), torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(0, 256, (2, 70))
    with torch.no_grad():
        assert (theirs(ids).logits - logits_of(model, ids)).abs().max() < 1e-4
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = text("some words", return_tensors="pt")["input_ids"]
    assert prompt[0].tolist() == [tokenizer.bos, *tokenizer.encode("some words")]
    wanted = [step[0] for step in model.generate([tokenizer.encode("some words")], 12)]
    found = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)[0, prompt.size(1):].tolist()
    assert found[:len(wanted)] == [id for id in wanted if id is not None]
    again = export.load_foreign(f"hf:{tmp_path / 'hf'}")
    assert (logits_of(again, ids) - logits_of(model, ids)).abs().max() < 1e-4


def test_the_tokenizer_goes_along(tmp_path):
    """The same ids for texts of all kinds, special tokens included, and back."""
    texts = ["def f(x):\n    return x + 1\n\n", "Zürich, \u4e16\u754c: 3.14159 and 27182", "  two  spaces\t\ttabs\r\nline", "it's WE'RE done", "a<bos>b", ""]
    for tokenizer in (Tokenizer("bytes"), train_tokenizer(texts * 20, 700)):
        source, about = export.to_foreign(tokenizer)
        (tmp_path / "tokenizer.json").write_text(source, encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(about)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in texts:
            if "<bos>" not in text:  # which `transformers` takes for the token
                assert theirs(text)["input_ids"] == [tokenizer.bos, *tokenizer.encode(text)]
                assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
        assert theirs.convert_tokens_to_ids("<255>") == tokenizer.sentinel(255)


def test_merges_are_the_way_a_token_is_made():
    ranks = [bytes([i]) for i in range(256)] + [b"ab", b"cd", b"abcd", b"bc"]
    assert merges_of(ranks) == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd"), (b"b", b"c")]


def test_out_through_the_script(tmp_path, text_file, monkeypatch, capsys):
    status, out, err = call(train.main, [*TINY_DEC, "--max_iters=3", f"--data={text_file}", "--out=dec"], monkeypatch, capsys)
    assert status == 0, err
    status, out, err = call(export.main, ["--run=dec", "--format=hf", "--precision=fp16"], monkeypatch, capsys)
    assert status == 0 and os.path.exists("dec-hf/tokenizer.json"), err
    card = open("dec-hf/README.md").read()
    assert "3 steps" in card and "Qwen3ForCausalLM" in card and text_file in card
    assert load_file("dec-hf/model.safetensors")["model.embed_tokens.weight"].dtype == torch.float16
    call(train.main, [*TINY_ENC, "--max_iters=3", f"--data={text_file}", "--out=enc"], monkeypatch, capsys)
    for words, said in ((["--run=enc", "--format=hf"], "no class of transformers computes what this encoder-decoder does"), (["--run=dec", "--format=hf", "--precision=int8"], "precisions fp32 and fp16"),
                        (["--run=dec", "--format=run", "--out=x"], "--format=run is for weights of others"), (["--run=hf:m"], "become a run first"), (["--run=hf:m", "--format=run"], "needs --out"),
                        (["--run=dec", "--format=hf", "--rows=3"], "--rows is for --format=onnx")):
        status, out, err = call(export.main, words, monkeypatch, capsys)
        assert status == 2 and said in one_line(err)
