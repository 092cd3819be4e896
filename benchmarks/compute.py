"""Parameters and FLOPs of the paper's models beside the published table, as Markdown and JSON.

    python benchmarks/compute.py [--output compute.json]

Counts shapes on the meta device; there is nothing to time and nothing that differs between machines.
"""

import argparse
import json
from importlib import resources
from pathlib import Path

from calm.evaluation.compute import compute
from calm.training.recipe.models import outline_model
from calm.training.recipe.recipe import Recipe

TOKENS = 5.0e11  # the published training costs are for this many
CONTEXT = 2048
# Parameters (without the autoencoder), training and inference FLOPs as printed in the paper.
PUBLISHED = {
    "transformer_s": ("281M", 6.6e20, 4.4e8),
    "transformer_m": ("465M", 11.9e20, 7.9e8),
    "transformer_l": ("849M", 22.5e20, 15.0e8),
    "calm_m": ("371M", 3.7e20, 2.9e8),
    "calm_l": ("735M", 7.7e20, 4.6e8),
    "calm_xl": ("1.82B", 19.5e20, 9.4e8),
}
OTHERS = ("calm_m_k1", "calm_m_k2", "calm_m_k8", "calm_m_diffusion", "calm_m_flow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write JSON here")
    output = parser.parse_args().output
    folder = Path(str(resources.files("calm") / "recipes" / "paper"))
    recipes = {path.stem: Recipe.load(path) for path in sorted(folder.glob("*.yaml"))}
    rows = {}
    for name in (*PUBLISHED, *OTHERS):
        model = outline_model(recipes[name], recipes.values())
        one, many = compute(model, CONTEXT), compute(model, CONTEXT, temperature=0.5, num_candidates=200)
        is_calm = one.parameters["autoencoder"] > 0
        rows[name] = {
            "parameters": one.parameters["language_model"],
            "training_flops": one.training_flops_per_token * TOKENS,
            "inference_flops_per_token": one.inference_flops_per_token,
            "inference_flops_per_token_200_candidates": many.inference_flops_per_token if is_calm else None,
            "published": PUBLISHED.get(name),
        }
    print(
        "| model | parameters | published | training FLOPs | published | inference FLOPs | published | 200 candidates |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        cells = [name, f"{row['parameters'] / 1e6:.2f}M"]
        published = row["published"] or (None, None, None)
        cells.append(published[0] or "")
        cells += [f"{row['training_flops']:.3g}", f"{published[1]:.3g}" if published[1] else ""]
        cells += [f"{row['inference_flops_per_token']['total']:.3g}", f"{published[2]:.3g}" if published[2] else ""]
        many_flops = row["inference_flops_per_token_200_candidates"]
        cells.append(f"{many_flops['total']:.3g}" if many_flops else "")
        print("| " + " | ".join(cells) + " |")
    print("\nFLOPs per generated token, one draw per chunk -> 200 draws (T = 0.5):\n")
    parts = ("backbone", "attention", "patch_embedding", "head", "autoencoder_decode", "total")
    print("| model | " + " | ".join(part.replace("_", " ") for part in parts) + " |")
    print("|---" + "|---:" * len(parts) + "|")
    for name, row in rows.items():
        one, many = row["inference_flops_per_token"], row["inference_flops_per_token_200_candidates"]
        if many:
            cells = [f"{one[p]:.3g}" if one[p] == many[p] else f"{one[p]:.3g} -> {many[p]:.3g}" for p in parts]
            print("| " + " | ".join([name, *cells]) + " |")
    if output is not None:
        output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
