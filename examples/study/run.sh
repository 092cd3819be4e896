#!/bin/sh
# The study of docs/results/small_scale.md: from text to report. Killed and started again, it goes on where it was;
# started several times, the processes share the work. In pieces of nine minutes: timeout --signal TERM 9m sh run.sh
#
#   sh examples/study/run.sh                                     # CPU size, on the embedded corpus
#   sh examples/study/run.sh gpu TRAIN.jsonl.zst VALID.jsonl.zst # one GPU, on a corpus of your own
set -eu
here=$(dirname "$0")
size=${1:-cpu}
out=${OUT:-runs/study_$size}
mkdir -p "$out"
if [ "$size" = cpu ]; then
    train=$out/corpus/train.jsonl validation=$out/corpus/validation.jsonl vocabulary=1024
    [ -f "$validation" ] || calm corpus "$out/corpus"
else
    train=$2 validation=$3 vocabulary=8192
fi
[ -f "$out/tokenizer/tokenizer.json" ] || calm tokenizer train "$train" -o "$out/tokenizer" --vocab-size $vocabulary
[ -f "$out/train/manifest.json" ] || calm prepare "$train" --tokenizer "$out/tokenizer" -o "$out/train"
[ -f "$out/validation/manifest.json" ] || calm prepare "$validation" --tokenizer "$out/tokenizer" -o "$out/validation"
calm study "$here/$size.yaml" -o "$out/models" "data.train=$out/train" "data.validation=$out/validation"
