#!/bin/bash
# Every speed and cost figure, about 40 minutes on two cores: bash assets/measure.sh [--device=cuda]
# Rows go to assets/bench_*.json, plots beside them. On another machine, give another folder:
# OUT=folder bash assets/measure.sh
#
# With --device=cuda, about 45 minutes on one card, all of it goes into one file, $OUT/cuda.json: the
# card, its rate of matrix products, speed (the paper's table 2), training tokens/s with the share of
# that rate, memory, and the loss of the ten minutes of assets/speedrun.md. Please send it.
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

if [ "${1:-}" = --device=cuda ]; then
    out=${OUT:-out/cuda}
    mkdir -p "$out"
    bench speed speed --engine=torch,compiled,t5 "$@"
    bench train train --batch=64 --dtype=bfloat16 "$@"
    bench train_330m train --preset=330m --engine=torch --src=1024 --new=256 --batch=8 \
        --grad_accum=4 --dtype=bfloat16 "$@"
    bench memory memory --src=4096 --new=256 --batch=32 "$@"
    rm -rf "$out/speedrun"
    $python train.py --preset=small --data="${DATA:-HuggingFaceFW/fineweb-edu}" \
        --max_tokens=500000000 --max_minutes="${MINUTES:-10}" --out="$out/speedrun" "$@"
    $python - "$out" <<'END'
import glob
import json
import sys

import torch

out, n = sys.argv[1], 8192
a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
for event in events:  # the first of the twenty spans warms up
    event.record()
    a @ b
torch.cuda.synchronize()
spans = sorted(one.elapsed_time(two) for one, two in zip(events[1:], events[2:]))
rate = 2 * n**3 / spans[len(spans) // 2] / 1e6  # GFLOP/s
found = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, matmul_gflop_s=round(rate))
for path in sorted(glob.glob(f"{out}/bench_*.json")):
    with open(path) as file:
        rows = json.load(file)["rows"]
    for row in rows:
        if "gflop_s" in row:
            row["mfu"] = round(row["gflop_s"] / rate, 3)
    found[path.split("bench_")[1][:-5]] = rows
with open(f"{out}/speedrun/log.jsonl") as file:
    found["speedrun"] = [row for row in map(json.loads, file) if "val_loss" in row][-1]
with open(f"{out}/cuda.json", "w") as file:
    json.dump(found, file, indent=1)
print(f"written to {out}/cuda.json")
END
    exit
fi

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
