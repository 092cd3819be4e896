#!/bin/sh
# Teach a model a few hundred answers, and count the ones that are right. Run it in the project's folder:
#   sh examples/chat/run.sh                     # the model of `make demo`; a few minutes on a CPU
#   sh examples/chat/run.sh MODEL [DIRECTORY]   # a model of your own
# Afterwards: calm serve runs/small_chat
set -e
model=${1:-runs/quickstart/calm}
directory=${2:-runs/small_chat}
data=$directory.data
if [ -x .venv/bin/calm ]; then PATH=$PWD/.venv/bin:$PATH; fi

python examples/chat/make_chats.py "$model" "$data"
calm prepare "$data/chats.jsonl" --conversations --tokenizer "$data/tokenizer" -o "$data/tokens"
calm train recipes/fine_tuning/chat.yaml "model.pretrained=$model" "data.train=$data/tokens" "output_dir=$directory"
python examples/chat/answers.py "$directory"
