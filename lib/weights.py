"""Weights of others: models of the Llama family and the paper's released one become runs, and
decoder-only runs become folders for `transformers`.

The Llama family, decoder-only, with plain RoPE: llama (Llama 2, SmolLM2), mistral, qwen2 (biases of
query, key and value) and qwen3 (norms of query and key). Others still serve as teachers of
distill.py. Names of weights on the left are ours, on the right theirs.
"""

import glob
import json
import math
import os
import pickle
from dataclasses import replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.tokenizer import load_tokenizer, to_foreign
from lib import runs
from lib.settings import UserError, read_json
from model import PRESETS, Config, ModelError, Transformer, count_params, make_config

FAMILIES = {"llama": {}, "mistral": {}, "qwen2": dict(bias="qkv"), "qwen3": dict(qk_norm=True)}


def local_folder(name, where, patterns=("*.json", "model*.safetensors")):
    """The folder of a model: `name` itself, or what is downloaded from the Hub under this id."""
    if os.path.isdir(name):
        return name
    if name.count("/") != 1 or name[0] in "./~":
        raise UserError(f"{where}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=[*patterns], ignore_patterns=["*/*"])
    except Exception as error:  # no network, no such model: the library raises its own kinds
        raise UserError(
            f"{where} could not be reached ({type(error).__name__}); give a local folder with "
            "config.json and model.safetensors"
        ) from None


def weight_files(folder, where):
    """The safetensors files of a folder, all that its index names."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        names = read_json(index).get("weight_map")
        names = sorted(set(map(str, names.values()))) if type(names) is dict else []
        if not names or any(os.path.basename(name) != name for name in names):
            raise UserError(f"{index} names no files of its own folder")
        files = [os.path.join(folder, name) for name in names]
        missing = [name for name in files if not os.path.isfile(name)]
        if missing:
            raise UserError(f"{where}: {len(missing)} shards are missing, the first: {missing[0]}")
        return files
    single = os.path.join(folder, "model.safetensors")
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    if not files:
        raise UserError(f"{where} has no .safetensors file; pickles, which can run code, are left")
    return [single] if single in files else files


def read_tensors(files, where):
    tensors = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{where}: {path} is truncated or no safetensors ({error})") from None
    return tensors


# ----------------------------------------------------------------------------------------------
# The Llama family


def llama_config(about, where):
    """config.json -> Config, but for the ids, which are the tokenizer's."""
    kind = str(about.get("model_type"))
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    rope = rope if type(rope) is dict else {}
    rope_kind = rope.get("rope_type") or rope.get("type") or "default"
    share = rope.get("partial_rotary_factor") or about.get("partial_rotary_factor") or 1
    for wrong, what in (
        (kind not in FAMILIES, f"is of model_type {kind!r}"[:60]),
        (rope_kind != "default" or share != 1, f"has scaled RoPE, {rope_kind!r}"[:60]),
        (about.get("quantization_config"), "holds quantized weights"),
        (about.get("hidden_act", "silu") != "silu", "has another hidden_act than silu"),
        (about.get("mlp_bias"), "has biases in its MLPs"),
    ):
        if wrong:
            raise UserError(
                f"{where} {what}: only llama, mistral, qwen2 and qwen3 with plain RoPE become "
                "runs; as a teacher, distill.py --teacher=hf: takes any causal model"
            )
    try:
        n_embd, n_head = about["hidden_size"], about["num_attention_heads"]
        window = about.get("sliding_window") if about.get("use_sliding_window", True) else None
        length = about["max_position_embeddings"]
        shape = dict(vocab_size=about["vocab_size"], n_dec=about["num_hidden_layers"])
        shape |= dict(n_kv_head=about.get("num_key_value_heads") or n_head, n_head=n_head)
        shape |= dict(head_dim=about.get("head_dim") or n_embd // n_head, n_embd=n_embd)
        theta = float(rope.get("rope_theta") or about.get("rope_theta") or 10000.0)
        shape |= dict(n_hidden=about["intermediate_size"], rope_theta=theta)
        dialect = dict(qk_norm=False, bias="qkv" if about.get("attention_bias") else "none")
        dialect |= FAMILIES[kind] | dict(norm_eps=float(about.get("rms_norm_eps", 1e-6)))
        tied = bool(about.get("tie_word_embeddings", False))
        # Within its window, sliding attention is attention.
        shape |= dict(n_enc=0, src_len=0, tgt_len=min(length, window or length), tied=tied)
        return Config(**shape, **dialect).check()
    except (KeyError, TypeError, ValueError, ZeroDivisionError, ModelError) as error:
        raise UserError(f"{where}: its config.json cannot be used ({error})"[:400]) from None


def llama_names(cfg):
    names = {"embed.weight": "model.embed_tokens.weight", "dec_norm.weight": "model.norm.weight"}
    names["head.weight"] = "lm_head.weight"
    parts = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    parts |= {f"attn.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    parts |= {f"attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
    parts |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for i in range(cfg.n_dec):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"dec.{i}.{ours}.{kind}"] = f"model.layers.{i}.{theirs}.{kind}"
    return names


def load_llama(name, where):
    folder = local_folder(name, where)
    files = weight_files(folder, where)
    config = llama_config(read_json(os.path.join(folder, "config.json")), where)
    if sum(map(os.path.getsize, files)) < count_params(config):  # a byte each, at least
        raise UserError(f"{where}: config.json describes more parameters than its files hold")
    tensors = read_tensors(files, where)
    if config.tied:
        tensors.pop("lm_head.weight", None)  # some files have it all the same
    for key, tensor in list(tensors.items()):
        if key.endswith("rotary_emb.inv_freq") or key.endswith("o_proj.bias") and not tensor.any():
            del tensors[key]  # follows from the config, and as good as none
    return assembled(config, tensors, llama_names(config), where), folder


def assembled(config, tensors, names, where):
    """A Transformer of `config` from foreign `tensors`. UserError for one that is missing, left
    over, of another shape, or not finite."""
    with torch.device("meta"):
        model = Transformer(config)
    found = {"embed_scale": torch.tensor(1.0)}
    for ours, p in model.named_parameters():
        tensor = tensors.pop(names[ours], None)
        if tensor is None:
            raise UserError(f"{where} lacks the weights {names[ours]}")
        if tensor.shape != p.shape:
            raise UserError(
                f"{where}: {names[ours]} is {tuple(tensor.shape)}, and {tuple(p.shape)} by its "
                "configuration"
            )
        if not all(map(torch.isfinite, torch.aminmax(tensor))):
            raise UserError(f"{where}: {names[ours]} holds numbers that are not finite")
        found[ours] = tensor
    if tensors:
        raise UserError(f"{where} has {len(tensors)} weights too many, one is {min(tensors)}")
    model.load_state_dict(found, assign=True)
    return model


# ----------------------------------------------------------------------------------------------
# The paper's released model, microsoft/encoder-decoder-slm


def mu_names(n_enc, n_dec):
    names = {"embed.weight": "transformer.wte.weight", "enc_norm.weight": "transformer.ln_e.weight"}
    names["dec_norm.weight"] = "transformer.ln_f.weight"
    linear = dict(wq="q_linear", wk="k_linear", wv="v_linear", wo="out_linear")
    mlp = {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    encoder = {f"attn.{a}": f"attn.{b}" for a, b in linear.items()} | mlp
    encoder |= {"attn_norm": "ln1", "mlp_norm": "ln2"}
    decoder = {f"attn.{a}": f"causal_attn.{b}" for a, b in linear.items()} | mlp
    decoder |= {f"cross.{a}": f"cross_attn.{b}" for a, b in linear.items()}
    decoder |= {"attn_norm": "ln1", "cross_norm": "ln2", "mlp_norm": "ln3"}
    for stack, n, letter, parts in (("enc", n_enc, "e", encoder), ("dec", n_dec, "h", decoder)):
        for i in range(n):
            for a, b in parts.items():
                for kind in ("weight", "bias"):
                    names[f"{stack}.{i}.{a}.{kind}"] = f"transformer.{letter}.{i}.{b}.{kind}"
    return names


def load_mu(path, where):
    """The released checkpoint: model_state_dict and, in newer ones, model_config. Of two query
    heads in a group the second stands behind all groups, so the heads are put into our order."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        about = dict(n_head=6, n_kv_head=3) | dict(state.get("model_config") or {})
        tensors = {key.split("_orig_mod.")[-1]: t for key, t in state["model_state_dict"].items()}
        layers = [[int(k.split(".")[2]) for k in tensors if f"transformer.{x}." in k] for x in "eh"]
        (n_enc, n_dec), n_head = (1 + max(found) for found in layers), about["n_head"]
        (words, n_embd), length = tensors["transformer.wte.weight"].shape, about.get("block_size")
        length, n_kv = length or 1024, about["n_kv_head"]
        head_dim = len(tensors["transformer.e.0.attn.q_linear.bias"]) // n_head
        theta = float(about.get("rope_theta", 10000))
        # A fixed factor of NTK scaling is another base.
        theta *= float(about.get("rope_factor") or 1) ** (head_dim / (head_dim - 2))
        config = Config(words, n_enc, n_dec, n_embd, n_head, n_kv, head_dim, mlp="gelu", bias="all")
        config.n_hidden = len(tensors["transformer.e.0.mlp.fc1.bias"])
        config = replace(config, src_len=length, tgt_len=length, rope_theta=theta, qk_norm=False)
        config.check()
    except FileNotFoundError:
        raise UserError(f"{where}: {path} is missing") from None
    except pickle.UnpicklingError:
        raise UserError(f"{where} asks for code to be run when it is read: refused") from None
    except Exception as error:  # torch.load and a stranger's dict raise many kinds
        raise UserError(f"{where} holds no model of the paper's code ({error})"[:300]) from None
    head = tensors.pop("lm_head.weight", tensors["transformer.wte.weight"])
    if not torch.equal(head, tensors["transformer.wte.weight"]):
        raise UserError(f"{where}: its output layer is not its embedding, as the paper's is")
    order = torch.arange(n_head).view(-1, n_kv).T.flatten()  # ours -> theirs
    order = torch.arange(n_head) if about.get("is_interleaved") else order
    for key, t in tensors.items():
        if ".q_linear." in key:
            tensors[key] = t.unflatten(0, (n_head, -1))[order].flatten(0, 1)
        elif key.endswith("out_linear.weight"):
            tensors[key] = t.unflatten(1, (n_head, -1))[:, order].flatten(1)
    return assembled(config, tensors, mu_names(n_enc, n_dec), where), os.path.dirname(path) or "."


# ----------------------------------------------------------------------------------------------
# Into a run, and out of one


@torch.no_grad()
def fit_vocabulary(model, tokenizer, where):
    """Gives a foreign model the special ids of this project, in rows of the embedding that no id
    had yet. Those past its end begin as the mean of all others, which is never the largest logit.
    A model begins as its own tokenizer begins: bos_id is -1 where that puts nothing in front."""
    cfg = model.config
    if tokenizer.kind != "hf" or tokenizer.n_text > cfg.vocab_size:
        raise UserError(f"{where} and the tokenizer do not belong together: --tokenizer=FILE")
    if tokenizer.eos >= tokenizer.n_text:
        raise UserError(f"{where}: its tokenizer names no end: is tokenizer_config.json there?")
    new = max(0, tokenizer.vocab_size - cfg.vocab_size)
    for holder in [model.embed, model.head] if new else []:
        if holder is not None:
            mean = holder.weight.float().mean(0, keepdim=True).to(holder.weight.dtype)
            holder.weight = torch.nn.Parameter(torch.cat((holder.weight, mean.expand(new, -1))))
    ids = dict(pad_id=tokenizer.pad, eos_id=tokenizer.eos)
    ids["bos_id"] = tokenizer.bos if cfg.n_enc else tokenizer.begin
    model.config = replace(cfg, vocab_size=cfg.vocab_size + new, **ids).check()
    return model


@torch.no_grad()
def to_encdec(model, n_enc, n_dec, bos_id):
    """A decoder-only model -> an encoder-decoder that starts from it (T5Gemma: Zhang et al., 2025):
    evenly spaced layers in both stacks; each cross-attention begins as the self-attention of its
    layer."""
    cfg, old, found = model.config, model.state_dict(), {}
    if not (1 <= n_enc <= cfg.n_dec and 1 <= n_dec <= cfg.n_dec):
        raise UserError(f"--n_enc and --n_dec: the model to start from has {cfg.n_dec} layers")
    new = Transformer(replace(cfg, n_enc=n_enc, n_dec=n_dec, src_len=cfg.tgt_len, bos_id=bos_id))
    for name in new.state_dict():
        stack, *rest = name.split(".")
        if stack in ("enc", "dec"):
            n = n_enc if stack == "enc" else n_dec
            layer = round(int(rest[0]) * (cfg.n_dec - 1) / max(1, n - 1))
            name_there = ".".join(["dec", str(layer), *rest[1:]]).replace("cross", "attn")
        else:
            name_there = name.replace("enc_norm", "dec_norm")
        found[name] = old[name_there].clone()
    new.load_state_dict(found, assign=True)
    return new


def write_run(name, folder, tokenizer=None, n_enc=None, n_dec=None):
    """hf:FOLDER_OR_ID or mu:FILE as a run, in a new folder; with n_enc and n_dec, a decoder-only
    model as an encoder-decoder of so many of its layers."""
    load = load_llama if name.startswith("hf:") else load_mu
    model, place = load(name[3:], name)
    if not tokenizer and not os.path.exists(os.path.join(place, "tokenizer.json")):
        raise UserError(f"{name} has no tokenizer.json beside it: name one with --tokenizer=FILE")
    words = load_tokenizer(tokenizer or place)
    model = fit_vocabulary(model, words, name)
    if n_enc or n_dec:
        if model.config.n_enc:
            raise UserError(f"{name} is an encoder-decoder already: leave --n_enc and --n_dec out")
        n = model.config.n_dec
        model = to_encdec(model, n_enc or n, n_dec or n, words.bos)
    os.makedirs(folder)
    model.save(folder)
    words.save(folder)
    size, sizes = math.log(model.num_params()), {}
    for preset in PRESETS:
        sizes[preset] = abs(math.log(count_params(make_config(preset, "dec"))) - size)
    kind = "prefix" if model.config.n_enc else "causal"
    settings = dict(objective=kind, arch="encdec" if model.config.n_enc else "dec")
    settings |= dict(preset=min(sizes, key=sizes.get), src_len=1024, tgt_len=256)
    runs.write_run(folder, settings, None, weights_of=name)


def write_hf(run, folder, precision):
    """A decoder-only run as a folder for `transformers`, of the class that computes the same."""
    model, tokenizer = Transformer.load(run), load_tokenizer(run)
    cfg, names = model.config, llama_names(model.config)
    if cfg.n_enc or cfg.mlp != "swiglu" or cfg.bias == "all":
        raise UserError(f"{run}: no class of the Llama family computes what it does")
    kind = {(False, "none"): "llama", (False, "qkv"): "qwen2"}.get((cfg.qk_norm, cfg.bias), "qwen3")
    about = dict(model_type=kind, hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_dec)
    about |= dict(num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head)
    about |= dict(head_dim=cfg.head_dim, intermediate_size=cfg.n_hidden, rms_norm_eps=cfg.norm_eps)
    about |= dict(vocab_size=cfg.vocab_size, max_position_embeddings=cfg.tgt_len)
    about |= dict(rope_theta=cfg.rope_theta, attention_bias=cfg.bias == "qkv" and kind == "qwen3")
    about |= dict(bos_token_id=cfg.bos_id, eos_token_id=cfg.eos_id, pad_token_id=cfg.pad_id)
    about |= dict(architectures=[f"{kind.capitalize()}ForCausalLM"], tie_word_embeddings=False)
    state = {names[ours]: p.detach() for ours, p in model.named_parameters()}
    head = model.head or model.embed
    state["lm_head.weight"] = head.weight.detach().clone()
    state["model.embed_tokens.weight"] = model.embed.weight.detach() * model.embed_scale
    if about["attention_bias"]:  # Qwen3's has one of the output as well
        for i in range(cfg.n_dec):
            zero = torch.zeros(cfg.n_embd)
            state[f"model.layers.{i}.self_attn.o_proj.bias"] = zero
    dtype = torch.float16 if precision == "fp16" else torch.float32
    os.makedirs(folder)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    save_file(state, os.path.join(folder, "model.safetensors"), dict(format="pt"))
    about["dtype"] = str(dtype)[6:]
    texts = dict(
        zip(("tokenizer.json", "tokenizer_config.json"), to_foreign(tokenizer, cfg.bos_id))
    )
    for name, text in (texts | {"config.json": json.dumps(about, indent=1)}).items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
