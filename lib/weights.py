"""Weights of others: models of the Llama family and the paper's released one become runs.
assets/to_hf.py goes the other way.

The Llama family, decoder-only, with plain RoPE: llama (Llama 2, SmolLM2), mistral, qwen2 (biases of
query, key and value) and qwen3 (norms of query and key). Others still serve as teachers of
distill.py. Names of weights on the left are ours, on the right theirs.
"""

import itertools
import math
import os
import pickle
from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data.tokenizer import load_tokenizer
from lib import runs
from lib.settings import UserError, read_json
from model import PRESETS, Config, ModelError, Transformer, count_params, make_config

FAMILIES = {"llama": {}, "mistral": {}, "qwen2": dict(bias="qkv"), "qwen3": dict(qk_norm=True)}
PLAIN = dict(rope_type="default", partial_rotary_factor=1, hidden_act="silu", mlp_bias=False)
PLAIN |= dict(quantization_config=None)
FIELDS = dict(vocab_size="vocab_size", n_dec="num_hidden_layers", n_embd="hidden_size")
FIELDS |= dict(n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim")
FIELDS |= dict(n_hidden="intermediate_size", tgt_len="max_position_embeddings")
FIELDS |= dict(norm_eps="rms_norm_eps", rope_theta="rope_theta", tied="tie_word_embeddings")


def local_folder(name, where):
    """The folder of a model: `name` itself, or what is downloaded from the Hub under this id."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    try:
        files = dict(allow_patterns=["*.json", "model*.safetensors"], ignore_patterns=["*/*"])
        return snapshot_download(name, **files)
    except Exception as error:  # no network, no such model: the library raises its own kinds
        raise UserError(f"{where}: no such folder, or model ({type(error).__name__})") from None


def weight_files(folder):
    """The files of weights in a folder: model.safetensors, or all that its index names."""
    index, names = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
    if os.path.exists(index):
        names = read_json(index).get("weight_map")
        names = sorted(set(map(str, names.values()))) if type(names) is dict else []
        if not names or any(os.path.basename(name) != name for name in names):
            raise UserError(f"{index} names no files of its own folder")
    return [os.path.join(folder, name) for name in names]


def check_teacher(folder):
    """UserError for a local folder with which `transformers` would go elsewhere, or never end."""
    path = os.path.join(folder, "config.json")
    if os.path.exists(path):  # an adapter has none
        weight_files(folder)
        layers = [x for key, x in read_json(path).items() if "layer" in key and type(x) is int]
        if max([0, *layers]) > 999:
            raise UserError(f"{path} tells of thousands of layers")


def read_weights(folder, where):
    """The tensors of a folder."""
    tensors = {}
    for path in weight_files(folder):
        try:
            if not os.path.isfile(path):  # a pipe would wait for its writer
                raise FileNotFoundError
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            reason = "missing, truncated or no safetensors; pickles, which can run code, are left"
            raise UserError(f"{where}: {path} is {reason} ({type(error).__name__})") from None
    return tensors


# ----------------------------------------------------------------------------------------------
# The Llama family


def llama_config(about, where):
    """config.json -> Config, but for the ids, which are the tokenizer's."""
    rope = about.get("rope_parameters") or about.get("rope_scaling")
    rope = rope if type(rope) is dict else {}
    about = about | rope | dict(rope_type=rope.get("rope_type") or rope.get("type"))
    odd = [key for key, plain in PLAIN.items() if about.get(key) not in (None, plain)]
    odd = odd if str(about.get("model_type")) in FAMILIES else ["model_type"]
    if odd:
        raise UserError(
            f"{where} has {odd[0]}={str(about.get(odd[0]))[:60]}: only llama, mistral, qwen2 and "
            "qwen3 with plain RoPE become runs; distill.py --teacher=hf: takes any causal model"
        )
    found = {ours: about[theirs] for ours, theirs in FIELDS.items() if about.get(theirs)}
    try:
        shape = dict(n_kv_head=found["n_head"], head_dim=found["n_embd"] // found["n_head"])
        shape |= dict(tied=False, qk_norm=False, n_enc=0, src_len=0) | found
        window = about.get("sliding_window") if about.get("use_sliding_window", True) else None
        # Within its window, sliding attention is attention.
        shape["tgt_len"] = min(shape["tgt_len"], window or shape["tgt_len"])
        shape["bias"] = "qkv" if about.get("attention_bias") else "none"
        return Config(**shape | FAMILIES[about["model_type"]]).check()
    except (KeyError, TypeError, ZeroDivisionError, ModelError) as error:
        raise UserError(f"{where}: its config.json cannot be used ({error})"[:400]) from None


def layer_names(ours, theirs, n, parts):
    """The names of all weights and biases in n layers, ours -> theirs."""
    names = {}
    for i, (a, b), kind in itertools.product(range(n), parts.items(), ("weight", "bias")):
        names[f"{ours}.{i}.{a}.{kind}"] = f"{theirs}.{i}.{b}.{kind}"
    return names


def llama_names(cfg):
    names = {"embed.weight": "model.embed_tokens.weight", "dec_norm.weight": "model.norm.weight"}
    names["head.weight"] = "lm_head.weight"
    parts = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    parts |= {f"attn.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    parts |= {f"attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
    parts |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    return names | layer_names("dec", "model.layers", cfg.n_dec, parts)


def load_llama(name, where):
    folder = local_folder(name, where)
    config = llama_config(read_json(os.path.join(folder, "config.json")), where)
    tensors = read_weights(folder, where)
    if config.tied:
        tensors.pop("lm_head.weight", None)  # some files have it all the same
    for key, tensor in list(tensors.items()):
        if key.endswith("rotary_emb.inv_freq") or key.endswith("o_proj.bias") and not tensor.any():
            del tensors[key]  # follows from the config, and as good as none
    return assembled(config, tensors, llama_names(config), where), folder


def assembled(config, tensors, names, where):
    """A Transformer of `config` from foreign `tensors`. UserError for one that is missing, left
    over, of another shape, or not finite."""
    ours = {theirs: ours for ours, theirs in names.items()}
    state = {ours.get(theirs, theirs): tensor for theirs, tensor in tensors.items()}
    with torch.device("meta"):  # no memory is taken before the shapes agree
        model = Transformer(config)
    try:
        model.load_state_dict(state | {"embed_scale": torch.tensor(1.0)}, assign=True)
    except RuntimeError as error:
        raise UserError(f"{where}: its weights do not fit its config: {error}"[:400]) from None
    for name, p in model.named_parameters():
        if not all(map(torch.isfinite, torch.aminmax(p))):
            raise UserError(f"{where}: {names[name]} holds numbers that are not finite")
    return model


# ----------------------------------------------------------------------------------------------
# The paper's released model, microsoft/encoder-decoder-slm


def mu_names(n_enc, n_dec):
    names = {"embed.weight": "transformer.wte.weight", "enc_norm.weight": "transformer.ln_e.weight"}
    names["dec_norm.weight"] = "transformer.ln_f.weight"
    mlp, linear = {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}, dict(q="q", k="k", v="v", o="out")
    encoder = mlp | {"attn_norm": "ln1", "mlp_norm": "ln2"}
    decoder = mlp | {"attn_norm": "ln1", "cross_norm": "ln2", "mlp_norm": "ln3"}
    for ours, theirs in linear.items():
        encoder[f"attn.w{ours}"] = f"attn.{theirs}_linear"
        decoder[f"attn.w{ours}"] = f"causal_attn.{theirs}_linear"
        decoder[f"cross.w{ours}"] = f"cross_attn.{theirs}_linear"
    names |= layer_names("enc", "transformer.e", n_enc, encoder)
    return names | layer_names("dec", "transformer.h", n_dec, decoder)


def load_mu(path, where):
    """The released checkpoint: model_state_dict and, in newer ones, model_config. Of two query
    heads in a group the second stands behind all groups, so the heads are put into our order."""
    try:
        if not os.path.isfile(path):  # a pipe would wait for its writer
            raise FileNotFoundError("missing or no plain file")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        about = dict(n_head=6, n_kv_head=3, block_size=1024, rope_theta=10000, rope_factor=1)
        about |= state.get("model_config") or {}
        tensors = {key.split("_orig_mod.")[-1]: t for key, t in state["model_state_dict"].items()}
        enc, dec = ({k.split(".")[2] for k in tensors if f"transformer.{x}." in k} for x in "eh")
        words, n_head, n_kv = tensors["transformer.wte.weight"], about["n_head"], about["n_kv_head"]
        head_dim = len(tensors["transformer.e.0.attn.q_linear.bias"]) // n_head
        n_hidden, length = len(tensors["transformer.e.0.mlp.fc1.bias"]), about["block_size"]
        shape = len(words), len(enc), len(dec), words.size(1), n_head, n_kv, head_dim, n_hidden
        # A fixed factor of NTK scaling is another base.
        theta = about["rope_theta"] * about["rope_factor"] ** (head_dim / (head_dim - 2))
        dialect = dict(mlp="gelu", bias="all", qk_norm=False, rope_theta=float(theta))
        config = Config(*shape, src_len=length, tgt_len=length, **dialect).check()
        if torch.equal(tensors.get("lm_head.weight", words), words):
            tensors.pop("lm_head.weight", None)  # tied, as the paper's is
        order = torch.arange(n_head)  # ours -> theirs
        order = order if about.get("is_interleaved") else order.view(-1, n_kv).T.flatten()
        for key, t in tensors.items():
            if ".q_linear." in key:
                tensors[key] = t.unflatten(0, (n_head, -1))[order].flatten(0, 1)
            elif key.endswith("out_linear.weight"):
                tensors[key] = t.unflatten(1, (n_head, -1))[:, order].flatten(1)
    except pickle.UnpicklingError:
        raise UserError(f"{where} asks for code to be run when it is read: refused") from None
    except Exception as error:  # torch.load and a stranger's dict raise many kinds
        raise UserError(f"{where} holds no model of the paper's code ({error})"[:300]) from None
    names = mu_names(config.n_enc, config.n_dec)
    return assembled(config, tensors, names, where), os.path.dirname(path) or "."


# ----------------------------------------------------------------------------------------------
# Into a run


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
    for holder in (model.embed, model.head):
        if holder is not None:
            mean = holder.weight.float().mean(0).to(holder.weight.dtype).expand(new, -1)
            holder.weight = torch.nn.Parameter(torch.cat((holder.weight, mean)))
    ids = dict(pad_id=tokenizer.pad, eos_id=tokenizer.eos)
    ids["bos_id"] = tokenizer.bos if cfg.n_enc else tokenizer.begin
    model.config = replace(cfg, vocab_size=cfg.vocab_size + new, **ids).check()


def to_encdec(model, n_enc, n_dec, bos_id):
    """A decoder-only model -> an encoder-decoder that starts from it (T5Gemma: Zhang et al., 2025):
    evenly spaced layers in both stacks; each cross-attention begins as the self-attention of its
    layer."""
    cfg = model.config
    n_enc, n_dec = n_enc or cfg.n_dec, n_dec or cfg.n_dec
    if cfg.n_enc or max(n_enc, n_dec) > cfg.n_dec:
        raise UserError(f"--n_enc and --n_dec take layers from the decoder, which has {cfg.n_dec}")
    new = Transformer(replace(cfg, n_enc=n_enc, n_dec=n_dec, src_len=cfg.tgt_len, bos_id=bos_id))
    new.load_state_dict(model.state_dict(), strict=False)  # embeddings, the last norm, the head
    new.enc_norm.load_state_dict(model.dec_norm.state_dict())
    for stack in (new.enc, new.dec):
        for i, block in enumerate(stack):
            old = model.dec[round(i * (cfg.n_dec - 1) / max(1, len(stack) - 1))].state_dict()
            cross = {k.replace("attn", "cross"): x for k, x in old.items() if k[:4] == "attn"}
            block.load_state_dict(old | cross, strict=False)  # an encoder's block has no cross
    return new


def write_run(name, folder, tokenizer=None, n_enc=None, n_dec=None):
    """hf:FOLDER_OR_ID or mu:FILE as a run, in a new folder; with n_enc and n_dec, a decoder-only
    model as an encoder-decoder of so many of its layers."""
    load = load_llama if name.startswith("hf:") else load_mu
    model, place = load(name[3:], name)
    words = load_tokenizer(tokenizer or place)
    fit_vocabulary(model, words, name)
    if n_enc or n_dec:
        model = to_encdec(model, n_enc, n_dec, words.bos)
    model.save(folder)
    words.save(folder)
    sizes = {preset: count_params(make_config(preset, "dec")) for preset in PRESETS}
    nearest = min(sizes, key=lambda preset: abs(math.log(sizes[preset] / model.num_params())))
    settings = dict(preset=nearest, objective="prefix" if model.config.n_enc else "causal")
    runs.write_run(folder, settings | dict(src_len=1024, tgt_len=256), None, weights_of=name)
