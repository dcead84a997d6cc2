#!/bin/bash
# Every speed and cost figure, about 40 minutes on two cores: bash assets/measure.sh [--device=cuda]
# Rows go to assets/bench_*.json, plots beside them. On another machine, give another folder:
# OUT=folder bash assets/measure.sh
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-assets}
python=${PYTHON:-python}
mkdir -p "$out"
bench() {
    name=$1
    shift
    echo "== $name"
    $python bench.py "$@" --json="$out/bench_$name.json" 2>>"$out/measure.log" \
        || echo "failed: $out/measure.log"
}

bench table2 speed --engine=torch,onnx-fp32,onnx-int8,onnx-int4,t5 "$@"
bench splits speed --archs=1/3,1/2 --engine=onnx-int8 "$@"
bench nocache speed --engine=nocache --new=4 "$@"
bench batch speed --engine=torch,onnx-int8 --batch=1,8,32 --new=32 --repeats=1 "$@"
bench source speed --engine=onnx-int8 --src=128,256,512,1024,2048,4096 --new=32 --repeats=3 \
    --plot="$out/speed_source.png" "$@"
bench answer speed --engine=onnx-int8 --src=128 --new=16,64,256,1024 --repeats=2 \
    --plot="$out/speed_answer.png" "$@"
all=--archs=dec,1/3,1/2,2/3
for lengths in 1024,256 4096,256 512,128 128,1024; do
    bench "flops_${lengths/,/_}" flops $all --src="${lengths%,*}" --new="${lengths#*,}"
done
bench memory memory $all --src=4096 --new=256 --batch=32 --dtype=float32 "$@"
bench train train --batch=8 --grad_accum=8 "$@"
bench train_ratio train --engine=torch --src=1024 --new=256 --batch=4 --grad_accum=4 --repeats=2 "$@"
bench vision vision --archs=2/3 --repeats=3 "$@"
