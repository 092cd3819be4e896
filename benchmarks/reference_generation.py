"""Run by generation.py in the reference implementation's interpreter: times its `generate`, prints JSON."""

import json
import statistics
import sys
import time

import torch


def main() -> None:
    clone, folder, new_tokens, repeats, *temperatures = sys.argv[1:]
    sys.path.insert(0, clone)
    from models.modeling_energy import EnergyTransformer

    model = EnergyTransformer.from_pretrained(f"{folder}/model").eval()
    model.padding_idx, model.eos_token_id = 0, -1  # every row runs to the end
    prompts = torch.load(f"{folder}/prompts.pt")
    seconds = []
    for temperature in map(float, temperatures):
        times = []
        # It is slow where draws are many: there one run to warm up and one to time.
        for _ in range(1 + (int(repeats) if temperature == 1 else 1)):
            started = time.perf_counter()
            with torch.no_grad():
                model.generate(prompts, max_length=prompts.shape[1] + int(new_tokens), temperature=temperature)
            times.append(time.perf_counter() - started)
        seconds.append(statistics.median(times[1:]))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
