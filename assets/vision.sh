#!/bin/bash
# The comparison on pictures, three hours on one core: bash assets/vision.sh [--device=cuda]
# What is in the results files already is not run again.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
compare() { $python bench.py compare --eval_split=test --threads=1 "$@"; }

# Shapes, from nothing. What runs have the same of: steps, and minutes.
shapes='--patch=16 --batch_size=5 --eval_rows=200 --compile=true'
compare --data=shapes --archs=dec,2/3 --max_iters=1200 --max_minutes=6 --train="$shapes" \
    --results=assets/vision-shapes.jsonl "$@"

# Charts: to read them first, then to answer questions, each architecture on its own reading run.
read_tables() { # one that was cut off goes on
    out=$1
    shift
    if [ -e "$out/train_state.pt" ]; then
        set -- --init_from=resume
    else
        rm -rf "$out"
        set -- --stage=ocr --data=tables --patch=40 --batch_size=4 --lr=4e-3 --max_minutes=8 \
            --eval_rows=120 --compile=true "$@"
    fi
    $python vision.py --out="$out" --threads=1 "$@"
}
read_tables out/tables-dec --arch=dec --image_size=160 --grid=0 "$@"
read_tables out/tables-23 --split=2/3 --image_size=160 --grid=0 "$@"
compare --data=charts --archs=dec,2/3 --seeds=1 --max_minutes=12 --init_from='out/tables-{split}' \
    --train='--batch_size=4 --lr=4e-3 --eval_rows=300 --compile=true' \
    --results=assets/vision-charts.jsonl "$@"

# The paper's table 3, on charts cut into four tiles and a thumbnail. All start from the same run,
# which has read charts with every tile.
read_tables out/tables-tiles --split=2/3 --image_size=80 --grid=2 --max_iters=800 "$@"
tiles='--stage=ocr --batch_size=4 --lr=4e-3 --eval_interval=100000 --eval_rows=100 --compile=true'
for way in '' ' --look=encoder' ' --look=decoder' ' --tokens=variance' ' --tokens=learned' \
    ' --tokens=concat --keep=0.5'; do
    compare --data=tables --archs=2/3 --seeds=3 --max_iters=400 --init_from=out/tables-tiles \
        --train="$tiles$way" --results=assets/vision-tiles.jsonl "$@"
done

# ViT-L/14-336, nine tiles and the thumbnail, 330m.
$python bench.py vision --archs=2/3 --json=assets/bench_vision.json "$@"
