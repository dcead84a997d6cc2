#!/bin/bash
# Every speed and cost figure of the README, about 40 minutes on two cores: bash assets/measure.sh [--device=cuda]
# Rows go to assets/bench_*.json, plots beside them. On another machine, give another folder: OUT=folder bash assets/measure.sh
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-assets}
python=${PYTHON:-python}
bench() { name=$1; shift; echo "== $name"; $python bench.py "$@" --json="$out/bench_$name.json" 2>>"$out/measure.log" || echo "failed: $out/measure.log"; }
mkdir -p "$out"
t5="n_enc=20 n_dec=10 n_embd=1024 n_head=6 n_kv_head=6 head_dim=64 n_hidden=2816 vocab_size=32128"

bench table2 speed --engine=torch,onnx-fp32,onnx-int8,onnx-int4 "$@"
bench splits speed --archs=1/3,1/2 --engine=onnx-int8 "$@"
bench shape speed --archs=2/3 --engine=onnx-int8,onnx-int4 --shape="$t5" "$@"
bench nocache speed --engine=nocache --new=4 "$@"
bench batch speed --engine=torch,onnx-int8 --batch=1,8,32 --new=32 --examples=1 "$@"
bench source speed --engine=onnx-int8 --src=128,256,512,1024,2048,4096 --new=32 --examples=3 --plot="$out/speed_source.png" "$@"
bench answer speed --engine=onnx-int8 --src=128 --new=16,64,256,1024 --examples=2 --plot="$out/speed_answer.png" "$@"
bench clients speed --engine=onnx-int8,onnx-int4 --clients=1,4,16 "$@"
for lengths in 1024,256 4096,256 512,128 128,1024; do bench "flops_${lengths/,/_}" flops --src=${lengths%,*} --new=${lengths#*,}; done
bench memory memory "$@"
bench train_ratio train --engine=encdec,dec --src=1024 --new=256 --batch=4 --rows=16 --repeats=2 --dtype=bfloat16 "$@"
