#!/bin/bash
# A decoder-only model becomes an encoder-decoder, about an hour on one core. What is there already
# is not run again: bash assets/foreign.sh [--device=cuda]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
train() { # one that was cut off goes on
    out=$1
    shift
    # Before its first checkpoint, there is nothing to go on with.
    [ -e "$out/train_state.pt" ] && set -- --init_from=resume || rm -rf "$out"
    $python train.py --out="$out" --threads=1 "$@"
}

train out/foreign-dec --arch=dec --max_minutes=6 "$@"
[ -e out/foreign-hf/config.json ] ||
    $python assets/to_hf.py --run=out/foreign-dec --out=out/foreign-hf
[ -e out/foreign-encdec/run.json ] ||
    $python export.py --format=run --run=hf:out/foreign-hf --n_enc=3 --n_dec=2 \
        --out=out/foreign-encdec

# Beside it, the same layers from nothing, for as many steps. Then both learn a task.
for seed in 1 2 3; do
    same="--objective=ul2 --max_iters=400 --eval_interval=50 --seed=$seed"
    train out/foreign-adapted-$seed --init_from=out/foreign-encdec --lr=5e-3 $same "$@"
    train out/foreign-scratch-$seed --n_enc=3 --n_dec=2 $same "$@"
done
for start in adapted scratch; do
    $python bench.py compare --data=docstring --archs=2/3 --max_iters=400 --threads=1 \
        --init_from="out/foreign-$start-{seed}" --train=--eval_interval=200 --eval_split=test \
        --results=assets/foreign-$start.jsonl "$@"
done
