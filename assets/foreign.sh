#!/bin/bash
# Every figure of the README's section on weights from elsewhere (about an hour, one core). What is there already is not run again. bash assets/foreign.sh [--device=cuda]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
run() { [ -e $1/loss.png ] || $python train.py --out=$1 --threads=1 "${@:2}"; }

# A decoder-only model becomes an encoder-decoder; beside it, the same encoder-decoder from nothing, for as long. Then both learn a task.
run out/foreign-dec --arch=dec --max_minutes=6 "$@"
for seed in 1 2 3; do
    same="--arch=encdec --n_enc=3 --n_dec=2 --objective=ul2 --max_minutes=2 --eval_interval=50 --seed=$seed"
    run out/foreign-adapted-$seed --init_from=out/foreign-dec --lr=5e-3 $same "$@"
    run out/foreign-scratch-$seed --n_hidden=448 $same "$@"
done
$python - <<'X'
import json
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for start, color in (("adapted", "tab:blue"), ("scratch", "tab:orange")):
    for seed in (1, 2, 3):
        rows = [row for line in open(f"out/foreign-{start}-{seed}/log.jsonl") if "val_loss" in (row := json.loads(line))]
        label = dict(adapted="from a decoder-only model", scratch="from nothing")[start] if seed == 1 else None
        axes.plot([row["time_s"] for row in rows], [row["val_loss"] for row in rows], color=color, marker=".", label=label)
axes.set(xlabel="seconds of training, one core", ylabel="held-out loss, ul2", ylim=(2.9, 6))
axes.legend()
figure.savefig("assets/adapted.png", dpi=120)
X
for start in adapted scratch; do
    $python bench.py compare --data=docstring --archs=2/3 --seeds=3 --max_minutes=2 --threads=1 --eval_split=test --results=assets/foreign-$start.jsonl \
        --train="--init_from=out/foreign-$start-{seed} --eval_interval=1000" "$@"
done

# Loading a billion parameters, beside a plain read of the file.
$python bench.py load --json=assets/bench_load.json

# The released model's architecture, random weights: its own way of computing (float32, the whole prefix at every step), and the exports.
mu='n_enc=20 n_dec=10 n_embd=1024 n_head=6 n_kv_head=3 head_dim=64 n_hidden=4096 mlp=gelu qkv_bias=true bias=true qk_norm=false embed_scale=1 vocab_size=32128'
$python bench.py speed --preset=330m --archs=2/3 --shape="$mu" --engine=nocache --dtype=float32 --threads=1 --examples=2 --json=assets/bench_mu_own.json "$@"
$python bench.py speed --preset=330m --archs=2/3 --shape="$mu" --engine=torch,onnx-fp32,onnx-int8 --threads=1 --json=assets/bench_mu.json "$@"
