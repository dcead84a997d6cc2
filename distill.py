"""Distills a decoder-only teacher of any size into a small encoder-decoder (or decoder-only) student, on a task.

    python distill.py --teacher=RUN --data=docstring                      a new nano student; the teacher is a run of train.py --arch=dec
    python distill.py --teacher=RUN --data=docstring --student=RUN        goes on with a student that is trained already
    python distill.py --teacher=hf:FOLDER_OR_ID --student=330m --data=squad      a causal language model that `transformers` loads
    python distill.py --teacher=hf:FOLDER_OR_ID --data=squad --finetune_teacher  first: LoRA on the task; writes an adapter to --out,
                                                                          which the next call takes as --teacher=hf:ADAPTER
    python distill.py --teacher=RUN --student=RUN --data=charts           runs of vision.py, or a teacher hf: of images and text: questions about pictures
    python distill.py --init_from=resume --out=out/NAME                   goes on where a run stopped

The paper's section 3.2 (Algorithm 1), after GKD (Agarwal et al., 2024). Source x and reference y* come from the task. y is what the
divergence is taken on: with --sequences=student (on-policy) an answer that the student has just written itself, with
teacher an answer of the teacher's, with data y*. At every position of y, both models say what they expect next:

    teacher   pad^n x y pad^m           logits from the last token of x on       (a teacher of ours: x sep y pad^n)
    student   x pad^n | bos y pad^m     logits of the decoder                    (decoder-only: x sep y pad^n)

    loss = alpha tau^2 D(student, teacher) on y  +  (1 - alpha) cross-entropy on y*

each a mean over real target positions. D is KL(student || teacher) (reverse), KL(teacher || student) (forward) or a generalized
Jensen-Shannon divergence, of distributions softened by the temperature tau. Answers that never change (teacher, data) are read by the
teacher once, before training, and its --top likeliest ids at each position are kept on disk.

The file reads top to bottom: settings, divergences, teachers, what is kept on disk, the job that train.py's loop runs, LoRA.
"""
import contextlib
import glob
import hashlib
import json
import os
import time
import zlib
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data.corpus
import train
from lib.settings import UserError, given, parse, script, setting
from data.metrics import score
from data.images import read_vision
from data.objectives import pad_rows, uniforms
from data.pairs import IMAGE
from data.picture_tasks import PicturePairs, is_picture_task, load as load_image
from lib.runs import read_record, write_json
from data.tokenizer import FILE, load_tokenizer
from model import PRESETS, SummedLoss, Transformer, count_params, make_config, read_config, read_metadata, shift_right
from train import Finetuning, adopt, evenly, launch, load_run, resolve, to_device
from vision import Seeing, VisionLM


@dataclass
class Settings(train.Settings):
    teacher: str = setting(None, "a run of train.py --arch=dec on the same task, or hf:FOLDER_OR_ID, a causal language model or a LoRA adapter of one")
    student: str = setting("nano", "a preset, with --arch and --split, or a run to go on with")
    data: str = setting("docstring", "a task, as in train.py: docstring, names, squad, xsum, codexglue, TASK:PATH ... or a file with --source_col and --target_col")
    alpha: float = setting(0.5, "share of the divergence in the loss: 0 is cross-entropy alone, 1 distillation alone")
    tau: float = setting(1.0, "temperature that softens both distributions")
    kl: str = setting("reverse", "reverse: KL(student || teacher); forward: KL(teacher || student); jsd: between the two", ("reverse", "forward", "jsd"))
    beta: float = setting(0.5, "jsd: weight of the teacher in the mixture that both are compared with")
    sequences: str = setting("student", "whose answers the divergence is taken on: student (on-policy), teacher, or data (the references)",
                             ("student", "teacher", "data"))
    mix: float = setting(1.0, "GKD's lambda: share of the rows that have such an answer; the others have their reference")
    refresh: int = setting(1, "steps between two rounds of --sequences=student, each of which writes the answers of all steps to the next")
    temperature: float = setting(1.0, "at which answers are drawn; 0 is greedy")
    top: int = setting(32, "ids of a position whose log-probabilities are kept on disk, with --sequences=teacher or data; 0 (data only) keeps nothing: the "
                       "teacher reads at every step")
    kept: str = setting(None, "folder of what is kept on disk; default: one of the cache, named by teacher, data and settings")
    template: str = setting(None, "hf: the teacher's prompt, with {source}; chat is its own chat template. Default: chat if it has one, else '{source}\\n'")
    finetune_teacher: bool = setting(False, "train a LoRA adapter of the teacher on the task, and nothing else")
    plan: bool = setting(False, "print the memory that a step takes, from shapes alone, and stop; the teacher's folder needs no weights")
    init_from: str = setting("scratch", "resume: go on with the run in --out", ("scratch", "resume"))
    tokenizer: str = setting(None, "default: the teacher's, or the student run's, which must agree")
    own: ClassVar = "distill"
    preset: ClassVar = None  # --student says it
    objective: ClassVar = "seq2seq"
    noise: ClassVar = 0.15
    mean_span: ClassVar = 3.0
    text_col: ClassVar = "text"
    max_tokens: ClassVar = 0
    decontaminate: ClassVar = None
    vocab_size: ClassVar = None


OWN = tuple(field.name for field in fields(Settings) if field.name not in {field.name for field in fields(train.Settings)})
LORA = dict(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")  # as the paper's released code has it ...
LORA_TARGETS = ("o_proj", "qkv_proj", "gate_up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # ... Phi's, and what others call them


def check(cfg):
    if not cfg.teacher and (cfg.alpha or cfg.finetune_teacher or cfg.plan):
        raise UserError("--teacher is missing: a run folder of train.py --arch=dec, or hf:FOLDER_OR_ID")
    for name in ("alpha", "mix", "beta"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be from 0 to 1")
    if cfg.kl == "jsd" and cfg.beta in (0, 1):
        raise UserError(f"--beta={cfg.beta}: at 0 and 1 that divergence is zero everywhere; take a value between, or --kl=forward or reverse")
    if not 0 < cfg.tau < float("inf"):
        raise UserError(f"--tau={cfg.tau} must be above 0")
    if not 0 <= cfg.temperature < float("inf"):
        raise UserError(f"--temperature={cfg.temperature} must not be negative")
    if cfg.refresh < 1:
        raise UserError(f"--refresh={cfg.refresh} must be at least 1")
    if cfg.top < 0 or (cfg.top == 0 and cfg.sequences == "teacher"):
        raise UserError(f"--top={cfg.top} must be at least 1 (0 is for --sequences=data)")
    if cfg.template and cfg.template != "chat" and "{source}" not in cfg.template:
        raise UserError(f"--template={cfg.template} must hold {{source}}, or be chat")
    if cfg.finetune_teacher and not cfg.teacher.startswith("hf:"):
        raise UserError(f"--finetune_teacher is for hf: teachers; a run like {cfg.teacher} is fine-tuned by train.py --init_from={cfg.teacher}")
    if cfg.finetune_teacher:
        optional("peft")
    useless = {"mix": cfg.sequences != "student", "refresh": cfg.sequences != "student", "temperature": cfg.sequences == "data", "top": cfg.sequences == "student",
               "kept": cfg.sequences == "student" or cfg.top == 0, "beta": cfg.kl != "jsd", "template": not (cfg.teacher or "hf:").startswith("hf:")}
    if cfg.finetune_teacher:
        useless = dict.fromkeys(set(OWN) - {"teacher", "template", "finetune_teacher"} | {"arch", "split", "n_enc", "n_dec", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden",
                                "cross_rope", "optimizer", "embed_lr", "dropout", "word_dropout", "label_smoothing", "tokenizer"}, True)
    for name in given():
        if useless.get(name) and cfg.init_from != "resume":
            raise UserError(f"--{name} would change nothing here; leave it out")


# ---------------------------------------------------------------------------------------------------------------------
# Divergences

def divergence(student, teacher, kl, beta=0.5):
    """Divergence in nats of each position, (N,), from log-probabilities (N, V) of student and teacher. `reverse` is
    KL(student || teacher), `forward` KL(teacher || student), `jsd` the generalized Jensen-Shannon divergence of GKD (Agarwal et al., 2024,
    section 2): beta KL(teacher || m) + (1 - beta) KL(student || m), where m = beta teacher + (1 - beta) student."""
    if kl == "reverse":
        return (student.exp() * (student - teacher)).sum(-1)
    if kl == "forward":
        return (teacher.exp() * (teacher - student)).sum(-1)
    m = torch.logaddexp(teacher + np.log(beta), student + np.log(1 - beta))
    return (beta * teacher.exp() * (teacher - m) + (1 - beta) * student.exp() * (student - m)).sum(-1)


def with_rest(logits, ids):
    """Log-probabilities (N, K) of these ids (N, K) and, in a last column, of all other ids together, at least 1e-6: (N, K + 1)."""
    every, these = logits.logsumexp(1, keepdim=True), logits.gather(1, ids)
    share = (these.logsumexp(1, keepdim=True) - every).clamp(max=-1e-6)
    return torch.cat((these - every, (-share.expm1()).log()), dim=1)


CHUNK = 2 ** 24  # logits that exist at a time: 64 MB in float32


def in_chunks(function, n_words, *tensors):
    """Sums function(*parts) over parts of the tensors (N, ...), so that no more than CHUNK logits exist at a time; the backward
    pass computes each part's again."""
    size = max(1, CHUNK // n_words)
    if len(tensors[0]) <= size:
        return function(*tensors)
    return sum(checkpoint(function, *part, use_reentrant=False) for part in zip(*(tensor.split(size) for tensor in tensors)))


# ---------------------------------------------------------------------------------------------------------------------
# Teachers. Each has: tokenizer; n_ids, how many of its ids are real; identity, which tells it from others; n_params; and
#   forbidden                    ids that no answer may have: placeholders of pictures
#   prompts(texts, pairs)        what it reads before an answer, for rows of a task: arrays of ids; shown(ids) is one for people
#   sees(rows, pairs)            what it is given of the pictures of these rows, by keyword: for `read` and `write`
#   read(prompts, answers)       what `head` turns into logits, one row for every token of every answer, in order: (N, ...)
#   head(read)                   logits (N, n_ids) of each of those tokens, given all before it
#   write(prompts, n, ...)       answers of at most n tokens: lists of ids

class OwnTeacher:
    """A decoder-only run of train.py, fine-tuned on the task: it reads source, end, separator, answer."""
    write_rows, read_rows = 128, 32  # at a time, where it does so in advance ...
    step_rows = None                 # ... and within a step: None is all of the step's
    forbidden = ()

    def __init__(self, folder, world, seeing=False):
        if seeing and read_vision(folder) is None:
            raise UserError(f"--teacher={folder} is a run without pictures: python vision.py --arch=dec trains one with")
        self.model = (VisionLM if seeing else Transformer).load(folder, device=world.device, dtype=world.dtype).eval().requires_grad_(False)
        if self.model.config.n_enc:
            raise UserError(f"--teacher={folder} is an encoder-decoder: a teacher is decoder-only")
        if read_record(folder)["settings"]["objective"] != "seq2seq":
            raise UserError(f"--teacher={folder} was not trained on a task: python train.py --data=TASK --init_from={folder} makes a teacher of it")
        if not os.path.exists(os.path.join(folder, FILE)):
            raise UserError(f"--teacher={folder} has no {FILE}")
        self.tokenizer, self.n_params = load_tokenizer(folder), self.model.num_params()
        self.n_ids = min(self.model.config.vocab_size, self.tokenizer.vocab_size)  # an embedding from elsewhere may have rows to spare
        best = os.path.join(folder, "best.safetensors")
        self.identity = read_metadata(best if os.path.exists(best) else os.path.join(folder, "model.safetensors")).get("crc32")

    def prompts(self, texts, pairs):
        if isinstance(pairs, PicturePairs):  # it has a tower and tiles of its own
            room = self.model.config.tgt_len - pairs.tgt_len - 1  # for the separator
            pairs = self.pairs = PicturePairs(pairs.rows, self.tokenizer, room, pairs.tgt_len, False, self.model.vision)
            pairs.skip_bad = True  # a picture that breaks when it is unpacked is named, or skipped, by the student's
        return [np.append(source, self.tokenizer.sep) for source in pairs.sources]

    def sees(self, rows, pairs):
        return self.pairs.shown(self.model, rows) if isinstance(pairs, PicturePairs) else {}

    def shown(self, ids):
        return self.tokenizer.show(ids)

    def read(self, prompts, answers, images=None):
        ids, real = pad_rows([np.concatenate(pair) for pair in zip(prompts, answers)], max(len(p) + len(a) for p, a in zip(prompts, answers)), self.tokenizer.pad)
        answer = real & (np.arange(ids.shape[1]) >= np.array([[len(prompt)] for prompt in prompts]))
        ids, answer = to_device((ids, answer), self.model.embed.weight.device)
        return self.model.decode(shift_right(ids, self.tokenizer.bos), **self.model.decoder_sees(images, None, ids))[answer]

    def head(self, states):
        return self.model.logits(states)[:, :self.n_ids]

    def write(self, prompts, n, temperature, seed, images=None):
        return written(self.model, [prompt.tolist() for prompt in prompts], n, temperature, seed, images)


class ForeignTeacher:
    """A causal language model of `transformers`, or a LoRA adapter of one, merged: it reads its prompt template, then the answer."""
    write_rows, read_rows, step_rows = 16, 8, None
    forbidden = ()

    def __init__(self, name, template, world):
        transformers, folder, self.where = library_for(name), name, f"--teacher=hf:{name}"
        with explained(self.where):
            if os.path.exists(os.path.join(name, "adapter_config.json")):
                with open(os.path.join(name, "adapter_config.json"), encoding="utf-8") as f:
                    folder = json.load(f)["base_model_name_or_path"]
            config = transformers.AutoConfig.from_pretrained(folder)
            if config.is_encoder_decoder:
                raise UserError(f"{self.where} is an encoder-decoder ({config.model_type}): a teacher is decoder-only")
            self.text = transformers.AutoTokenizer.from_pretrained(folder)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=world.dtype).to(world.device)
            if folder != name:
                self.model = optional("peft").PeftModel.from_pretrained(self.model, name).merge_and_unload()
            self.model.generation_config = transformers.GenerationConfig()  # no penalties: answers are drawn from what is distilled
        self.model.eval().requires_grad_(False)
        self.device, self.folder, self.merged = world.device, folder, folder != name
        self.tokenizer = load_tokenizer(tokenizer_file(self.text))
        self.n_ids, self.n_params = self.tokenizer.n_text, sum(p.numel() for p in self.model.parameters())
        if self.n_ids > self.model.get_input_embeddings().num_embeddings:
            raise UserError(f"{self.where}: its tokenizer has {self.n_ids} ids, its embedding {self.model.get_input_embeddings().num_embeddings}")
        if self.tokenizer.eos >= self.n_ids:
            raise UserError(f"{self.where}: its tokenizer has no end of sequence (eos_token), so that its answers would not end")
        with torch.no_grad():  # softcaps and scales of logits make some models more than their last layer
            probe = dict(input_ids=torch.arange(3, device=self.device)[None], use_cache=False)
            self.by_states = torch.allclose(self.model.get_output_embeddings()(self.model.base_model(**probe).last_hidden_state), self.model(**probe).logits, rtol=1e-2, atol=1e-3)
        self.template = (template or ("chat" if self.text.chat_template else "{source}\n")).replace("\\n", "\n")
        if self.template == "chat" and not self.text.chat_template:
            raise UserError(f"{self.where} has no chat template: give its prompt with --template='...{{source}}...'")
        self.identity = [self.template, *identity_of(name, folder)]

    def shown(self, ids):
        return self.text.decode(ids)

    def sees(self, rows, pairs):
        return {}

    def prompts(self, texts, pairs):
        """What is longer than the student reads is cut at the same place."""
        texts = [self.tokenizer.decode(ids[:-1].tolist()) if len(ids) > pairs.room else text for text, ids in zip(texts, pairs.sources)]
        if self.template == "chat":
            filled = [self.text.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True, tokenize=False) for text in texts]
            found = self.text(filled, add_special_tokens=False)["input_ids"]
        else:
            found = self.text([self.template.replace("{source}", text) for text in texts])["input_ids"]
        found = [ids[:-1] if ids and ids[-1] == self.tokenizer.eos else ids for ids in found]  # some tokenizers end every text
        return [np.array(ids, dtype=np.int64) for ids in found]

    def read(self, prompts, answers):
        """pad^n x y pad^m, (B, S + T), so that all answers begin in one column; column S - 1 expects the first token of y. -> (N, C) for the N tokens of all answers."""
        S, T = max(map(len, prompts)), max(map(len, answers))
        ids, real = np.zeros((len(prompts), S + T), dtype=np.int64), np.zeros((len(prompts), S + T), dtype=bool)
        for b, (prompt, answer) in enumerate(zip(prompts, answers)):
            place = slice(S - len(prompt), S + len(answer))
            ids[b, place], real[b, place] = np.concatenate((prompt, answer)), True
        ids, real = to_device((ids, real), self.device)
        inputs = dict(input_ids=ids, attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0), use_cache=False)
        if self.by_states:
            found = self.model.base_model(**inputs).last_hidden_state
        else:
            found = self.model(**inputs, logits_to_keep=T + 1).logits
        return found[:, -T - 1:-1][real[:, S:]]  # (B, T, C), and of that where answers are

    def head(self, found):
        return (self.model.get_output_embeddings()(found) if self.by_states else found)[:, :self.n_ids]

    def write(self, prompts, n, temperature, seed):
        torch.manual_seed(seed)
        S = max(map(len, prompts))
        ids = torch.tensor([[0] * (S - len(prompt)) + prompt.tolist() for prompt in prompts], device=self.device)
        real = torch.tensor([[0] * (S - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        drawn = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        if spare := range(self.n_ids, self.model.get_input_embeddings().num_embeddings):  # rows of the embedding that stand for nothing
            drawn |= dict(suppress_tokens=list(spare))
        found = self.model.generate(input_ids=ids, attention_mask=real, max_new_tokens=n, pad_token_id=self.tokenizer.eos, eos_token_id=self.tokenizer.eos, **drawn)
        return [row[:row.index(self.tokenizer.eos) + 1] if self.tokenizer.eos in row else row for row in found[:, S:].tolist()]


class ForeignSeeingTeacher:
    """A model of `transformers` that reads images and text (Phi-3-Vision in the paper, section 4.3; LLaVA, Qwen-VL and others). Its own processor prepares a row, and it
    reads one row at a time: how rows of several pictures are padded together differs from model to model."""
    write_rows, read_rows, step_rows = 1, 1, 1

    def __init__(self, name, template, world):
        transformers, self.where = library_for(name), f"--teacher=hf:{name}"
        with explained(self.where):
            self.processor = transformers.AutoProcessor.from_pretrained(name)
            self.model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=world.dtype).to(world.device)
            self.model.generation_config = transformers.GenerationConfig()
        self.model.eval().requires_grad_(False)
        self.device, self.text = world.device, self.processor.tokenizer
        self.tokenizer = load_tokenizer(tokenizer_file(self.text))
        self.n_params = sum(p.numel() for p in self.model.parameters())
        self.n_ids = min(self.tokenizer.n_text, self.model.get_output_embeddings().weight.size(0))
        if self.tokenizer.eos >= self.n_ids:
            raise UserError(f"{self.where}: its tokenizer has no end of sequence (eos_token), so that its answers would not end")
        self.forbidden = {id for id in [getattr(self.model.config, "image_token_id", None)] if id is not None}
        self.template = (template or ("chat" if getattr(self.processor, "chat_template", None) else "{source}\n")).replace("\\n", "\n")
        self.identity = [self.template, *identity_of(name)]

    def shown(self, ids):
        return self.text.decode(ids)

    def prompts(self, texts, pairs):
        """The ids of each row's prompt, for people and for the lengths; `sees` makes what is read."""
        return [np.array(self.text(text)["input_ids"], dtype=np.int64) for text in map(self.filled, texts)]

    def filled(self, text):
        if self.template != "chat":
            return self.template.replace("{source}", text.replace(IMAGE, getattr(self.processor, "image_token", IMAGE)))
        parts = text.split(IMAGE)
        content = [part for k, words in enumerate(parts) for part in ([dict(type="image")] * (k > 0) + [dict(type="text", text=words)] * bool(words))]
        return self.processor.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True, tokenize=False)

    def sees(self, rows, pairs):
        [row] = rows
        images = [load_image(ref, f"picture {k + 1} of row {row + 1}") for k, ref in enumerate(pairs.rows[row]["images"])]
        inputs = self.processor(text=self.filled(pairs.rows[row]["source"]), images=images or None, return_tensors="pt").to(self.device)
        return dict(inputs={name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()})

    def read(self, prompts, answers, inputs):
        [answer] = answers
        ids = torch.cat((inputs["input_ids"], torch.tensor([list(answer)], device=self.device)), dim=1)
        more = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        for name in ("token_type_ids", "mm_token_type_ids"):  # an answer is text
            if name in more:
                more[name] = F.pad(more[name], (0, len(answer)))
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more).logits[0, -len(answer) - 1:-1]

    def head(self, logits):
        return logits[:, :self.n_ids]

    def write(self, prompts, n, temperature, seed, inputs):
        torch.manual_seed(seed if isinstance(seed, int) else seed[0])
        drawn = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        if unusable := [*self.forbidden, *range(self.n_ids, self.model.get_input_embeddings().num_embeddings)]:
            drawn |= dict(suppress_tokens=unusable)
        found = self.model.generate(**inputs, max_new_tokens=n, pad_token_id=self.tokenizer.eos, eos_token_id=self.tokenizer.eos, **drawn)
        row = found[0, inputs["input_ids"].size(1):].tolist()
        return [row[:row.index(self.tokenizer.eos) + 1] if self.tokenizer.eos in row else row]


def written(model, prompts, n, temperature, seed, images=None):
    """Answers of a Transformer, with the end-of-sequence of those that ended: lists of ids."""
    steps = list(model.generate(prompts, n, temperature, seed=seed, images=images))
    answers = [[step[b] for step in steps if step[b] is not None] for b in range(len(prompts))]
    return [answer + [model.config.eos_id] * (len(answer) < n) for answer in answers]


def optional(package):
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"this needs the package {package}: pip install 'nanoencdec[teacher]', or pip install transformers peft") from None


@contextlib.contextmanager
def explained(where):
    """What goes wrong in loading a foreign model, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds, and of several packages below it
        raise UserError(f"{where} cannot be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__} ({type(error).__name__}). It takes "
                        "a folder (or Hub id) with config.json, weights as safetensors, and tokenizer.json") from None


def tokenizer_file(text):
    """The tokenizer.json of a `transformers` tokenizer, with its bos and eos beside it, in the cache."""
    if not getattr(text, "backend_tokenizer", None):
        raise UserError(f"the teacher's tokenizer ({type(text).__name__}) has no tokenizer.json")
    source = text.backend_tokenizer.to_str()
    folder = os.path.join(data.corpus.CACHE, "tokenizer-" + hashlib.sha256(f"{source}{text.bos_token}{text.eos_token}".encode()).hexdigest()[:12])
    if not os.path.exists(folder):  # made whole, then renamed: other processes may want it, too
        os.makedirs(new := f"{folder}.{os.getpid()}")
        write_json(os.path.join(new, FILE), json.loads(source))
        write_json(os.path.join(new, "tokenizer_config.json"), dict(bos_token=text.bos_token, eos_token=text.eos_token))
        with contextlib.suppress(OSError):
            os.rename(new, folder)
    return folder


def library_for(name):
    """`transformers`, quiet; UserError if a teacher's folder is not there."""
    transformers = optional("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if (not name or name.count("/") > 1 or name[0] in "./~") and not os.path.isdir(name):
        raise UserError(f"--teacher=hf:{name}: no such folder")
    return transformers


def identity_of(*folders):
    """What tells the weights in these folders from others: their checksums, or the name of what lies on the Hub."""
    files = sorted(path for place in set(folders) for kind in ("*.safetensors", "*.bin") for path in glob.glob(os.path.join(place, kind)))
    return [folders[0] if not files else "", *(f"{os.path.basename(path)}:{file_crc(path):08x}" for path in files)]


def file_crc(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2 ** 24):
            crc = zlib.crc32(block, crc)
    return crc


def load_teacher(cfg, world, seeing):
    if cfg.teacher.startswith("hf:"):
        return (ForeignSeeingTeacher if seeing else ForeignTeacher)(cfg.teacher[3:], cfg.template, world)
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(cfg.teacher, "config.json"), encoding="utf-8") as f:
            if "model_type" in json.load(f):
                raise UserError(f"--teacher={cfg.teacher} looks like a model of Hugging Face: --teacher=hf:{cfg.teacher}")
    return OwnTeacher(cfg.teacher, world, seeing)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept on disk: answers that never change, and what the teacher expects at their positions

def in_groups(rows, size):
    return np.array_split(rows, -(-len(rows) // size))


class Kept:
    """A folder with, for every training row, an answer (the teacher's own, or the reference) and the teacher's log-probabilities of its
    `top` likeliest ids at each position, and of all others together. Made in parts, so that a run that is cut off goes on there."""
    PART = 512  # rows

    def __init__(self, folder, about, n_rows):
        self.folder, self.n_rows = folder, n_rows
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "about.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                found = json.load(f)
            if different := [key for key in about if found.get(key) != about[key]]:
                raise UserError(f"--kept={folder} is of another {different[0]} ({found.get(different[0])}, not {about[different[0]]}): take another folder, or leave "
                                "--kept out")
        elif os.listdir(folder):
            raise UserError(f"--kept={folder} holds something else")
        else:
            write_json(path, about)

    def path(self, part):
        return os.path.join(self.folder, f"{part:06d}.npz")

    def missing(self):
        return [part for part in range(-(-self.n_rows // self.PART)) if not os.path.exists(self.path(part))]

    def add(self, part, answers, ids, logp):
        """answers: lists of ids of the part's rows; ids (N, K) and logp (N, K + 1) of their tokens one after another."""
        new = f"{self.path(part)}.{os.getpid()}"  # two runs may be making it
        with open(new, "wb") as f:
            np.savez(f, lengths=np.array([len(answer) for answer in answers]), answers=np.concatenate(answers), ids=ids.astype(np.int32), logp=logp.astype(np.float16))
        os.replace(new, self.path(part))

    def load(self):
        parts = []
        for part in range(-(-self.n_rows // self.PART)):
            with np.load(self.path(part)) as found:
                parts.append(dict(found))
        self.ids, self.logp = (np.concatenate([part[name] for part in parts]) for name in ("ids", "logp"))
        self.ends = np.cumsum(np.concatenate([part["lengths"] for part in parts]))
        self.answers = np.split(np.concatenate([part["answers"] for part in parts]), self.ends[:-1])

    def rows(self, rows):
        """ids (N, K) and log-probabilities (N, K + 1) of these rows' answers, one after another."""
        at = np.concatenate([np.arange(self.ends[row] - len(self.answers[row]), self.ends[row]) for row in rows])
        return self.ids[at].astype(np.int64), self.logp[at].astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The job

class Distillation(Finetuning):
    """The rows of a task, with answers on which the student is to expect what its teacher expects."""
    what, vision = "the data or the teacher", None

    def __init__(self, cfg, world, say):
        self.teacher = load_teacher(cfg, world, self.vision is not None) if cfg.teacher else None
        self.cfg, self.world, self.say, self.kept = cfg, world, say, None
        self.carry, self.writing, self.making = dict(skipped=0), 0.0, 0.0  # answers by (step, row); seconds
        super().__init__(cfg, world, say)
        if cfg.alpha == 0 or cfg.sequences == "data":
            self.prepare = None  # no answers beside the references
        if not self.teacher:
            return
        self.check_ids()
        self.hash = hashlib.sha256(json.dumps([self.hash, self.teacher.identity]).encode()).hexdigest()[:12]
        self.prompts = self.teacher.prompts([row["source"] for row in self.pairs["train"].rows], self.pairs["train"])
        if cfg.alpha and cfg.sequences != "student" and cfg.top:
            self.kept = self.open_kept()
        shown = self.teacher.shown(self.prompts[0])
        say(f"teacher: {self.teacher.n_params:,} parameters; it reads {shown[:150]!r} ... {shown[-60:]!r}")

    def make_tokenizer(self, rows):
        if self.cfg.tokenizer is None and self.teacher:
            return self.teacher.tokenizer
        self.cfg.tokenizer = self.cfg.tokenizer or "bpe"
        return super().make_tokenizer(rows)

    def check_ids(self):
        """Student and teacher must split every text into the same ids, and end an answer with the same one."""
        mine, theirs = self.tokenizer, self.teacher.tokenizer
        for row in self.pairs["train"].rows[:200]:
            for text in (row["source"], row["target"]):
                if mine.encode(text) != theirs.encode(text):
                    raise UserError(f"--teacher={self.cfg.teacher} splits text into other ids than the student (the first training row that differs begins {text[:40]!r}): "
                                    "train the student with the teacher's vocabulary, --tokenizer=FOLDER_OF_THE_TEACHER")
        n = min(mine.n_text, theirs.n_text)
        if mine.ranks[:n] != theirs.ranks[:n] or any(mine.ranks[n:] + theirs.ranks[n:]) or mine.eos != theirs.eos:
            raise UserError(f"--teacher={self.cfg.teacher} has another vocabulary than the student, or another end of sequence: train the student with "
                            "--tokenizer=FOLDER_OF_THE_TEACHER")
        if n < theirs.n_text:  # `transformers` gives some tokenizers special ids that their files do not have
            self.teacher.n_ids = n

    def open_kept(self):
        cfg, pairs = self.cfg, self.pairs["train"]
        about = dict(teacher=self.teacher.identity, data=self.hash, sequences=cfg.sequences, tau=cfg.tau, top=cfg.top, sources_cut_at=pairs.room if pairs.cut["source"] else None,
                     tgt_len=cfg.tgt_len, rows=len(pairs), dtype=str(self.world.dtype), **(dict(temperature=cfg.temperature) if cfg.sequences == "teacher" else {}))
        name = "teacher-" + hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        return Kept(cfg.kept or os.path.join(data.corpus.CACHE, name), about, len(pairs))

    def about(self):
        return dict(distill={name: getattr(self.cfg, name) for name in OWN}, teacher_s=self.making)

    def start(self, model):
        """Makes what is kept on disk, or what is missing of it."""
        self.model = model
        if not self.kept:
            return
        start, missing = time.perf_counter(), self.world.agree(self.kept.missing())
        for part in tqdm(missing[self.world.rank::self.world.size], desc=f"the teacher {'writes' if self.cfg.sequences == 'teacher' else 'reads'}", unit="part",
                         disable=self.world.rank > 0):
            self.make_part(part)
        self.world.gather(None)  # all parts are there
        self.kept.load()
        path = os.path.join(self.kept.folder, "seconds.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                self.making = json.load(f)
        if missing:
            self.making += time.perf_counter() - start
            self.say(f"made {len(missing)} parts of {self.kept.folder} in {time.perf_counter() - start:.0f} s")
            if self.world.rank == 0:
                write_json(path, self.making)

    def limit(self, row):
        """Tokens that an answer to a row may have, so that early answers, which do not end, cost no more than others."""
        return min(self.cfg.tgt_len, len(self.pairs["train"].targets[row]) + 16)

    @torch.no_grad()
    def make_part(self, part):
        cfg, pairs = self.cfg, self.pairs["train"]
        rows = np.arange(part * Kept.PART, min((part + 1) * Kept.PART, len(pairs)))
        rows = rows[np.argsort([len(self.prompts[row]) for row in rows], kind="stable")]
        answers, found = {}, {}
        for some in in_groups(rows, self.teacher.write_rows):
            if cfg.sequences == "teacher":
                limits = [self.limit(row) for row in some]
                drafts = self.teacher.write([self.prompts[row] for row in some], max(limits), cfg.temperature, seed=int(some[0]) * 1000, **self.teacher.sees(some, pairs))
                answers |= {row: answer[:limit] for row, answer, limit in zip(some, drafts, limits)}
            else:
                answers |= {row: pairs.targets[row].tolist() for row in some}
        for some in in_groups(rows, self.teacher.read_rows):
            read, parts = self.teacher.read([self.prompts[row] for row in some], [answers[row] for row in some], **self.teacher.sees(some, pairs)), []
            for piece in read.split(max(1, CHUNK // self.teacher.n_ids)):
                logits = self.teacher.head(piece).float() / cfg.tau
                ids = logits.topk(min(cfg.top, logits.size(1) - 1)).indices
                parts.append((ids.cpu().numpy(), with_rest(logits, ids).cpu().numpy()))
            ends = np.cumsum([len(answers[row]) for row in some])[:-1]
            found |= dict(zip(some, zip(*(np.split(np.concatenate(side), ends) for side in zip(*parts)))))
        order = sorted(answers)
        self.kept.add(part, [answers[row] for row in order], *(np.concatenate([found[row][k] for row in order]) for k in (0, 1)))

    def batch_at(self, step, rows):
        chosen, real = self.share(step, rows)
        references = self.pairs["train"].batch(chosen)
        references[3][real:] = False
        answers = None
        if self.cfg.alpha and self.cfg.sequences == "teacher":
            answers = [self.usable(self.kept.answers[row].tolist()) for row in chosen[:real]]
        tokens = int(self.pairs["train"].lengths[chosen[:real]].sum())
        return Batch(to_device(references, self.world.device), chosen, chosen[:real], rows, answers, 1.0, self.pictures(chosen), tokens)

    def pictures(self, rows):
        return None

    def usable(self, answer):
        """An answer with a text, or None: what is empty or all padding is skipped and counted."""
        return answer if any(id not in (self.tokenizer.eos, self.tokenizer.pad) for id in answer) else None

    def prepare(self, step, batches):
        """Puts the student's answers into a step's batches, and the weight that makes both losses means over their own positions."""
        if self.cfg.sequences == "student":
            batches = self.student_answers(step, batches)
        answers = [answer for batch in batches for answer in batch.answers]
        n, m, skipped = self.world.sum(sum(int(batch.references[3].sum()) for batch in batches), sum(len(answer) for answer in answers if answer), answers.count(None))
        self.carry["skipped"] += int(skipped)
        return [batch._replace(scale=n / max(1, m)) for batch in batches]  # the loop divides by n

    def student_answers(self, step, batches):
        """With the weights of this moment, the student answers this step's rows and those of the steps before the next refresh."""
        start = time.perf_counter()
        if any((step, int(row)) not in self.carry for batch in batches for row in batch.rows):
            for place in set(self.carry) - {"skipped"}:
                del self.carry[place]
            later = range(step, step - step % self.cfg.refresh + self.cfg.refresh)
            shares = [(at, *self.share(at, batch.numbers)) for at in later for batch in batches]
            self.student_writes([(at, int(row)) for at, rows, real in shares for row in rows[:real]])
        self.writing += time.perf_counter() - start
        return [batch._replace(answers=[self.carry[step, int(row)] for row in batch.rows]) for batch in batches]

    def student_writes(self, places):
        """Answers for these (step, row): a pure function of them and the weights, whatever else is written beside them. An answer ends, too, where it
        has an id that the teacher does not know."""
        cfg, pairs = self.cfg, self.pairs["train"]
        drawn = [place for place in places if uniforms(cfg.seed + 2, place[0], [place[1]], 1)[0, 0] < cfg.mix]
        self.carry.update((place, pairs.targets[place[1]].tolist()) for place in places)
        drawn.sort(key=lambda place: self.limit(place[1]))
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):  # its shapes differ from step to step
            for some in (drawn[i:i + 128] for i in range(0, len(drawn), 128)):
                limits = [self.limit(row) for _, row in some]
                seeds = [((cfg.seed * 1_000_003 + step) * 1_000_003 + row) % 2 ** 63 for step, row in some]
                sees = pairs.shown(self.model, [row for _, row in some])
                for place, limit, answer in zip(some, limits, written(self.model, [pairs.prompt(row) for _, row in some], max(limits), cfg.temperature, seeds, **sees)):
                    end = next((t for t, id in enumerate(answer) if id >= self.teacher.n_ids or id == self.tokenizer.pad or id in self.teacher.forbidden), limit)
                    self.carry[place] = self.usable(answer[:min(end, limit)])
        self.model.train()

    def loss_of(self, model, batch):
        """alpha tau^2 D + (1 - alpha) cross-entropy, summed, and the number of targets of the references; for the log, both by themselves."""
        cfg = self.cfg
        src, src_mask, tgt, mask = batch.references
        images, _, extra = model.tokens_of(batch.pictures) if batch.pictures else (None, [], 0.0)
        encoded = model.encode(src, src_mask, images) if model.config.n_enc else None
        n = int(mask.sum())

        def states(tgt, mask):
            return model.decode(shift_right(tgt, model.config.bos_id), encoded, src_mask, **model.decoder_sees(images, src, tgt))[mask]  # (N, C)

        loss, log = model.embed.weight[0, 0] * 0 + n * extra, {}
        references = [(self.cross_entropy, [tgt[mask]])] if cfg.alpha < 1 else []
        taught, at_answers, m = self.taught(batch, states) if cfg.alpha > 0 else ([], None, 0)
        if batch.answers is None:  # both losses are on the references: their logits are needed once
            found = self.sums(model, states(tgt, mask), *references, *taught)
        else:
            found = [*(self.sums(model, states(tgt, mask), *references) if references else []), *self.sums(model, at_answers, *taught)]
        if references:
            loss, log["cross_entropy"] = loss + (1 - cfg.alpha) * found[0], (found[0].detach(), n)
        if cfg.alpha > 0:  # every process logs the same names
            log["divergence"] = (found[-1].detach(), m) if m else (0.0, 0)
            loss = loss + cfg.alpha * cfg.tau ** 2 * batch.scale * found[-1] if m else loss
        if cfg.alpha > 0 and cfg.sequences == "student":
            log["writing_s"], self.writing = (self.writing, self.writing > 0), 0.0
        return loss, n, log

    def taught(self, batch, states):
        """The divergence on this batch's answers as a term for `sums`; the student's states at their tokens (None where they are the references'); how many
        those are. States stand row after row, and so does what the teacher gives: that is the alignment."""
        pairs, device, rows = self.pairs["train"], self.world.device, batch.rows
        answers, at_answers = [pairs.targets[row] for row in rows], None
        if batch.answers is not None:
            # As many rows as the references, of which the sources are already read: those without an answer, and filler, have no loss.
            padded = [*batch.answers, *[None] * (len(batch.every) - len(rows))]
            tgt, mask = pairs.batch(batch.every, targets=[answer or [self.tokenizer.eos] for answer in padded])[2:]
            mask[[answer is None for answer in padded]] = False
            rows, answers = [row for row, answer in zip(rows, batch.answers) if answer], [answer for answer in batch.answers if answer]
            at_answers = states(*to_device((tgt, mask), device)) if answers else None
        if not len(answers):
            return [], None, 0
        m = sum(map(len, answers))
        if self.kept:
            return [(self.divergence_from_kept, to_device(self.kept.rows(rows), device))], at_answers, m
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # it has its own precision
            read, size = [], self.teacher.step_rows or len(rows)
            for i in range(0, len(rows), size):
                some = rows[i:i + size]
                read.append(self.teacher.read([self.prompts[row] for row in some], answers[i:i + size], **self.teacher.sees(some, pairs)))
            return [(self.divergence_from_read, [torch.cat(read)])], at_answers, m

    def sums(self, model, states, *terms):
        """Sums of `terms`, functions of the logits at states (N, C) and of their own tensors (N, ...), computed in chunks."""
        if not terms:
            return []

        def chunk(states, *tensors):
            logits, tensors = model.logits(states).float(), iter(tensors)
            return torch.stack([function(logits, *(next(tensors) for _ in own)) for function, own in terms])
        return in_chunks(chunk, 2 * model.config.vocab_size, states, *(tensor for _, own in terms for tensor in own))

    def cross_entropy(self, logits, targets):
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.cfg.label_smoothing if self.model.training else 0.0)

    def divergence_from_read(self, logits, read):
        """With the teacher's whole distribution, over the ids that both have."""
        with torch.no_grad():
            teacher = (self.teacher.head(read).float() / self.cfg.tau).log_softmax(-1)
        student = (logits[:, :teacher.size(1)] / self.cfg.tau).log_softmax(-1)
        return divergence(student, teacher, self.cfg.kl, self.cfg.beta).sum()

    def divergence_from_kept(self, logits, ids, logp):
        """With the teacher's likeliest ids and, as one more outcome, all others together."""
        return divergence(with_rest(logits[:, :self.teacher.n_ids] / self.cfg.tau, ids), logp, self.cfg.kl, self.cfg.beta).sum()

    def summary(self, metrics):
        return super().summary(metrics) + (f"; {self.carry['skipped']:,} answers were empty and skipped" if self.carry["skipped"] else "")


class SeeingDistillation(Distillation):
    """The same with pictures: the student is a run of vision.py, which says how it sees them."""
    load_task, make_pairs = Seeing.load_task, Seeing.make_pairs

    def __init__(self, cfg, world, say):
        self.vision = read_vision(cfg.out if cfg.init_from == "resume" else cfg.init_from)
        super().__init__(cfg, world, say)

    def make_model(self):
        model = VisionLM.load(*((self.cfg.out, "model.safetensors") if self.cfg.init_from == "resume" else (self.cfg.init_from,)))
        for name, p in model.named_parameters():
            p.requires_grad_(not (name.startswith("tower") and self.vision.from_file))
        model.tiles_a_row = float(np.mean(self.pairs["train"].tiles()))
        return model

    def pictures(self, rows):
        return self.pairs["train"].pictures(rows)


class Batch(NamedTuple):
    """Some of a step's rows. The loop wants the number of tokens last."""
    references: list      # (src, src_mask, tgt, loss_mask), as the model takes them; it may have filler rows without a loss at its end
    every: np.ndarray     # the numbers of these rows in the training set ...
    rows: np.ndarray      # ... and without the filler
    numbers: np.ndarray   # what they were asked for as: numbers in the global batch
    answers: list | None  # lists of ids, what the divergence is taken on, None for one that is skipped; None: the references
    scale: float          # targets of the references over tokens of the answers, of the whole step
    pictures: list | None  # of all rows of the references
    tokens: int


# ---------------------------------------------------------------------------------------------------------------------
# A teacher that learns the task first: LoRA (Hu et al., 2021), by the `peft` library

class Adapter(nn.Module):
    """A foreign model with LoRA, as train.py's loop takes a model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, SummedLoss()

    def trained(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops(self, src_len, tgt_len):
        return 2 * self.num_params() * (src_len + tgt_len)

    def compiled_parts(self):
        return []

    def save(self, folder, weights, **metadata):
        save_file({name: p.detach().cpu().contiguous() for name, p in self.trained().items()}, os.path.join(folder, weights), metadata=metadata)

    def restore(self, path):
        missing = set(self.trained()) ^ set(found := load_file(path))
        if missing:
            raise UserError(f"{path} is not an adapter of this teacher: {sorted(missing)[0]} is in one of them alone")
        with torch.no_grad():
            for name, p in self.trained().items():
                p.copy_(found[name])


class TeacherTuning(Finetuning):
    """The rows of a task in the teacher's own form: its prompt template, the answer, its end of sequence; the loss is on the answer."""
    what, about = Distillation.what, Distillation.about
    making = 0.0

    def __init__(self, cfg, world, say):
        self.teacher = ForeignTeacher(cfg.teacher[3:], cfg.template, world)
        if self.teacher.merged:
            raise UserError(f"{self.teacher.where} is an adapter already: fine-tune its base, {self.teacher.folder}")
        super().__init__(cfg, world, say)
        self.hash = hashlib.sha256(json.dumps([self.hash, self.teacher.identity]).encode()).hexdigest()[:12]
        self.prompts = {split: self.teacher.prompts([row["source"] for row in self.task.splits[split]], pairs) for split, pairs in self.pairs.items()}
        say(f"teacher: {self.teacher.n_params:,} parameters; its prompt ends with {self.teacher.shown(self.prompts['train'][0])[-60:]!r}")

    def make_tokenizer(self, rows):
        return self.teacher.tokenizer

    def make_model(self):
        peft = optional("peft")
        names = {name.split(".")[-1] for name, module in self.teacher.model.named_modules() if isinstance(module, nn.Linear)}
        if not names & set(LORA_TARGETS):
            raise UserError(f"{self.teacher.where} has none of the projections {', '.join(LORA_TARGETS)}: LoRA does not know what to adapt")
        self.adapter = Adapter(peft.get_peft_model(self.teacher.model, peft.LoraConfig(**LORA, target_modules=sorted(names & set(LORA_TARGETS)))))
        if self.cfg.init_from == "resume":
            self.adapter.restore(os.path.join(self.cfg.out, "model.safetensors"))
        return self.adapter.train()

    def batch_at(self, step, rows):
        chosen, real = self.share(step, rows)
        return chosen[:real], int(self.pairs["train"].lengths[chosen[:real]].sum())

    def loss_of(self, model, batch):
        return self.loss_on("train", batch[0])

    def loss_on(self, split, rows):
        if not len(rows):
            return sum(p.sum() * 0 for p in self.adapter.trained().values()), 0
        targets = [self.pairs[split].targets[row] for row in rows]
        read = self.teacher.read([self.prompts[split][row] for row in rows], targets)
        ids = torch.from_numpy(np.concatenate(targets)).to(read.device)
        return in_chunks(lambda read, ids: F.cross_entropy(self.teacher.head(read).float(), ids, reduction="sum"), self.teacher.n_ids, read, ids), len(ids)

    @torch.no_grad()
    def evaluate(self, model, step, say):
        model.eval()
        rows, held_out, sums, texts = evenly(len(self.pairs["val"]), self.cfg.eval_rows), self.task.splits["val"], np.zeros(2), {}
        for some in np.array_split(rows, -(-len(rows) // 32))[self.world.rank::self.world.size]:
            with self.world.precision():
                loss, n = self.loss_on("val", some)
                sums += loss.item(), n
                if step:
                    answers = self.teacher.write([self.prompts["val"][row] for row in some], self.cfg.tgt_len, 0.0, 0)
                    texts |= {int(row): self.tokenizer.decode(answer) for row, answer in zip(some, answers)}
        total, n = self.world.sum(*sums)
        metrics = dict(val_loss=total / n)
        if step:
            texts = {row: text for part in self.world.gather(texts) for row, text in part.items()}
            metrics |= score(self.task, [texts[row] for row in rows], [held_out[row] for row in rows])
            say(f"--- source: {held_out[rows[0]]['source'][:300]}\n>>> {texts[rows[0]][:300]}\n=== {held_out[rows[0]]['target'][:300]}\n---")
        model.train()
        return metrics

    def summary(self, metrics):
        if self.world.rank == 0:
            best = os.path.join(self.cfg.out, "best.safetensors")
            self.adapter.restore(best if os.path.exists(best) else os.path.join(self.cfg.out, "model.safetensors"))
            self.adapter.model.save_pretrained(self.cfg.out)
            self.teacher.text.save_pretrained(self.cfg.out)
        names = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "step")
        return f"{self.task.name}, step {metrics['step']}, the best: {names}. Distill it: python distill.py --teacher=hf:{self.cfg.out} --data={self.cfg.data}"


# ---------------------------------------------------------------------------------------------------------------------

def plan(cfg):
    """What a step takes, in bytes by part, from shapes: Muon, matrix products in bf16, attention that keeps no scores. Returns {part: bytes}."""
    if cfg.teacher.startswith("hf:"):
        transformers = optional("transformers")
        with explained(f"--teacher={cfg.teacher}"), torch.device("meta"):
            about = transformers.AutoConfig.from_pretrained(cfg.teacher[3:])
            weights = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(about).parameters())
        words, width, hidden = about.vocab_size + 261, about.hidden_size, about.intermediate_size  # the student's own ids on top
    else:
        about = read_config(cfg.teacher)
        weights, words, width, hidden = count_params(about), about.vocab_size, about.n_embd, about.n_hidden
    S, T, rows = cfg.src_len, cfg.tgt_len, cfg.batch_size
    changes = {name: getattr(cfg, name) for name in ("n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden") if getattr(cfg, name)}
    c = read_config(cfg.init_from) if cfg.init_from != "scratch" else make_config(cfg.preset, cfg.arch, cfg.split, cfg.n_enc, cfg.n_dec, S, T, vocab_size=words, **changes)
    heads, shared, n = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, count_params(c)
    layer = 12 * c.n_embd + 2 * (2 * heads + 2 * shared) + 8 * c.n_hidden  # bytes a token: two norms' inputs and outputs, q k v and their result, the MLP's four
    cross = 6 * c.n_embd + 2 * 2 * heads
    decoded = T if c.n_enc else S + T
    passes = (cfg.alpha < 1) + (cfg.alpha > 0 and (cfg.sequences != "data" or cfg.alpha == 1))
    activations = c.n_enc * S * layer + passes * c.n_dec * (decoded * (layer + (cross if c.n_enc else 0)) + (S * 4 * shared if c.n_enc else 0))
    caches = 4 * 2 * c.n_dec * shared * (S + T) if cfg.alpha and cfg.sequences == "student" else 0
    return {"teacher's weights, bf16": 2 * weights, "teacher's largest activations": rows * 2 * (S + T) * (4 * width + 3 * hidden),
            "student's weights, gradients, momentum in float32, weights in bf16": 14 * n + 4 * c.vocab_size * c.n_embd, f"student's activations, {rows} rows of {S} + {T}": rows * activations,
            "student's caches while it writes": min(128, rows * cfg.grad_accum * cfg.refresh) * caches, "logits of a chunk and what the divergence makes of them": 8 * 4 * CHUNK}


def main():
    cfg = parse(Settings, __doc__)
    if cfg.init_from == "resume":
        cfg = load_run(cfg)
    check(cfg)
    if cfg.init_from != "resume" and cfg.student in PRESETS:
        cfg.preset = cfg.student
    elif cfg.init_from != "resume":
        if not os.path.isdir(cfg.student):
            raise UserError(f"--student={cfg.student} is neither a preset ({', '.join(PRESETS)}) nor a run folder")
        cfg.init_from = cfg.student
        adopt(cfg, "student")
    if cfg.finetune_teacher:
        cfg.arch, cfg.lr, cfg.optimizer = "dec", cfg.lr or 2e-4, "adamw"
    seeing = is_picture_task(cfg.data) or read_vision(cfg.out if cfg.init_from == "resume" else cfg.init_from) is not None
    if seeing and (cfg.init_from == "scratch" or cfg.finetune_teacher or cfg.plan):
        raise UserError(f"--data={cfg.data} has pictures: --student=RUN is a run of vision.py, and --finetune_teacher and --plan are for texts")
    if seeing and cfg.init_from != "resume" and read_vision(cfg.init_from) is None:
        raise UserError(f"--student={cfg.student} is a run without pictures, and --data={cfg.data} has some")
    if seeing and cfg.init_from != "resume":
        parent = read_config(cfg.init_from)
        cfg.src_len, cfg.tgt_len = cfg.src_len or parent.src_len or parent.tgt_len - 64, cfg.tgt_len or (parent.tgt_len if parent.n_enc else 64)
    cfg = resolve(cfg)
    if cfg.plan:
        parts = plan(cfg)
        for part, size in (parts | {"together": sum(parts.values())}).items():
            print(f"{size / 1e9:8.2f} GB  {part}")
        return
    name = os.path.splitext(os.path.basename(cfg.data.rstrip("/")))[0]
    if cfg.finetune_teacher:
        launch(cfg, TeacherTuning, f"teacher-{name}")
    else:
        launch(cfg, SeeingDistillation if seeing else Distillation, f"distilled-{cfg.arch}-{cfg.preset}-{name}")


if __name__ == "__main__":
    script(main)
