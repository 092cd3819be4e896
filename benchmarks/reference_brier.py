"""Run by brier.py in the reference implementation's interpreter: times its evaluation of a block, prints JSON."""

import json
import sys
import time

import torch


def main() -> None:
    clone, folder = sys.argv[1:]
    sys.path.insert(0, clone)
    ids = torch.load(f"{folder}/ids.pt")
    with open(f"{folder}/model/config.json") as file:
        is_calm = "patch_size" in json.load(file)
    if is_calm:
        from models.modeling_energy import EnergyTransformer

        model = EnergyTransformer.from_pretrained(f"{folder}/model").eval()
        model.padding_idx = -1

        def run() -> None:
            model(input_ids=ids, labels=ids.clone())

    else:
        from train.train_ar import CustomTrainer
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(f"{folder}/model").eval()

        def run() -> None:
            CustomTrainer.compute_loss(None, model, {"input_ids": ids, "labels": ids.clone()})

    with torch.no_grad():
        model(input_ids=ids[:, :64], labels=ids[:, :64].clone())  # warm
        started = time.perf_counter()
        run()
    print(json.dumps(time.perf_counter() - started))


if __name__ == "__main__":
    main()
