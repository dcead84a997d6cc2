"""Weights of others: models of the Llama family. assets/to_hf.py goes the other way,
assets/from_mu.py reads the paper's released model.

The Llama family, decoder-only, with plain RoPE: llama (Llama 2, SmolLM2), mistral, qwen2 (biases of
query, key and value) and qwen3 (norms of query and key). Others still serve as teachers of
distill.py. Names of weights on the left are ours, on the right theirs.
"""

import itertools
import os
from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lib.settings import UserError, read_json
from model import Config, ModelError, Transformer

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
