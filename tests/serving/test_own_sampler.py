"""The sampler of docs/sampling.md: registered in a module of the user's, used by every caller."""

import sys
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from conftest import serving

from calm import SamplingParams
from calm.cli import main as cli
from calm.generation import samplers
from calm.generation.completions import complete

DOCS = Path(__file__).parent.parent.parent / "docs" / "sampling.md"
MODULE = DOCS.read_text(encoding="utf-8").partition("```python\n# my_sampler.py\n")[2].partition("```")[0]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_sampler.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "my_sampler"
    sys.modules.pop("my_sampler", None)
    samplers._SAMPLERS.pop("smaller_of_two", None)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["calm", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_sampler_of_ones_own_works_in_generate_command_line_and_server(
    module, calm, tokenizer, tmp_path, monkeypatch, capsys
):
    calm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["generate", tmp_path / "model", "--prompt", "fox", "--max-new-tokens", 9, "--seed", 4]
    code, _, error = run(monkeypatch, capsys, *command, "--sampler", "smaller_of_two")
    assert code == 2
    assert "sampler must be one of batch, exact, direct, mtp, got 'smaller_of_two'" in error
    code, text, error = run(monkeypatch, capsys, *command, "--sampler", "smaller_of_two", "--import", module)
    assert code == 0, error
    assert "smaller_of_two" in calm.samplers

    params = SamplingParams(sampler="smaller_of_two", max_new_tokens=9, seed=4)
    (result,) = complete(calm, tokenizer, ["fox"], params)
    assert text.removesuffix("\n") == "fox" + result["text"]
    assert result["samples_per_patch"] == 2
    generator = [torch.Generator().manual_seed(4)]
    ids = torch.tensor([tokenizer("fox")["input_ids"]])
    out = calm.generate(ids, sampler="smaller_of_two", max_new_tokens=9, generator=generator)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == result["text"]

    with serving([("calm", (calm, tokenizer))]) as (address, _), httpx.Client(base_url=address) as http:
        body = {"prompt": "fox", "max_tokens": 9, "seed": 4, "sampler": "smaller_of_two"}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == result["text"]
        assert "smaller_of_two" in http.get("/v1/models").json()["data"][0]["samplers"]
        refused = http.post("/v1/completions", json=body | {"sampler": "larger_of_two"})
        assert refused.status_code == 400
        assert "sampler must be one of batch, exact, direct, mtp, smaller_of_two" in refused.text
        refused = http.post("/v1/completions", json=body | {"top_p": 0.5}).json()["error"]["message"]
        assert "top_p=0.5 needs token probabilities, and sampler smaller_of_two only has samples" in refused
