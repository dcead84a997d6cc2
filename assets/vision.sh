#!/bin/bash
# Every figure of the README's section on pictures: the comparison on shapes (fifty minutes, one core) and charts (forty-five minutes, two cores), the ablation (forty minutes, one core), what a picture
# costs (ten minutes). What is in the results files already is not run again. bash assets/vision.sh [--device=cuda]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

shapes='--patch=16 --batch_size=5 --eval_rows=200 --compile=true'
$python bench.py compare --data=shapes --archs=dec,2/3 --seeds=3 --max_minutes=6 --threads=1 --train="$shapes" --eval_split=test --results=assets/vision-shapes.jsonl "$@"

# Charts: to read them first, then to answer questions, each architecture on its own reading run.
read_tables() {  # a run that was cut off is begun again
    [ -e $1/done ] || { rm -rf $1; $python vision.py --stage=ocr --data=tables --out=$1 --patch=40 --batch_size=4 --lr=4e-3 --max_minutes=8 --eval_rows=120 --compile=true "${@:2}"; touch $1/done; }
}
read_tables out/tables-dec --arch=dec --image_size=160 --grid=0 "$@"
read_tables out/tables-23 --split=2/3 --image_size=160 --grid=0 "$@"
charts='--init_from=out/tables-{arch} --batch_size=4 --lr=4e-3 --eval_rows=300 --compile=true'
$python bench.py compare --data=charts --archs=dec,2/3 --seeds=1 --max_minutes=12 --train="$charts" --eval_split=test --results=assets/vision-charts.jsonl "$@"

# The paper's table 3, on charts cut into four tiles. All start from the same run, which has read charts with every token.
read_tables out/tables-tiles --split=2/3 --image_size=80 --grid=2 --threads=1 "$@"
tiles='--stage=ocr --init_from=out/tables-tiles --batch_size=4 --lr=4e-3 --eval_rows=100 --compile=true'
for way in '' ' --look=encoder' ' --look=decoder' ' --tokens=variance' ' --tokens=variance --variance_of=features' ' --tokens=learned' ' --tokens=concat --keep=0.5'; do
    $python bench.py compare --data=tables --archs=2/3 --seeds=1 --max_minutes=3 --threads=1 --train="$tiles$way" --eval_split=test --results=assets/vision-tiles.jsonl "$@"
done

$python bench.py vision --json=assets/bench_vision.json "$@"                             # ViT-L/14-336, nine tiles and the thumbnail, 330m
$python bench.py vision --step --preset=800m --archs=dec,1/2 --tokens=variance --grid=1 --json=assets/bench_vision_step.json "$@"
