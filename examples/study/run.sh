#!/bin/sh
# The study of docs/results/small_scale.md: from text to report. Killed and started again, it goes on where it was;
# started several times, the processes share the work. In pieces of nine minutes: timeout --signal TERM 9m sh run.sh
#
#   sh examples/study/run.sh                                     # CPU size, on the embedded corpus
#   sh examples/study/run.sh cpu VALIDATION.jsonl TRAIN.jsonl... # the same on a corpus of your own
#   sh examples/study/run.sh english VALIDATION TRAIN...         # the paper's recipe and ours on more text
#   sh examples/study/run.sh gpu VALIDATION.jsonl TRAIN.jsonl... # one GPU
#
# OUT is where everything goes (default runs/study_cpu, ...).
set -eu
here=$(dirname "$0")
size=${1:-cpu}
out=${OUT:-runs/study_$size}
case $size in
cpu | english) vocabulary=1024 ;;
gpu) vocabulary=8192 ;;
*) echo "run.sh: the plan is cpu, english or gpu, got $size" >&2; exit 2 ;;
esac
if [ $# -ge 3 ]; then
    validation=$2
    shift 2
elif [ "$size" = cpu ] && [ $# -le 1 ]; then
    validation=$out/corpus/validation.jsonl
    [ -f "$validation" ] || calm corpus "$out/corpus"
    set -- "$out/corpus/train.jsonl"
else
    echo "run.sh: give a file to validate on and files to train on" >&2; exit 2
fi
mkdir -p "$out"
[ -f "$out/tokenizer/tokenizer.json" ] || calm tokenizer train "$@" -o "$out/tokenizer" --vocab-size $vocabulary
[ -f "$out/train/manifest.json" ] || calm prepare "$@" --tokenizer "$out/tokenizer" -o "$out/train"
[ -f "$out/validation/manifest.json" ] || calm prepare "$validation" --tokenizer "$out/tokenizer" -o "$out/validation"
calm study "$here/$size.yaml" -o "$out/models" "data.train=$out/train" "data.validation=$out/validation"
