"""The error of bfloat16 models against float64, ours beside stock eager: the patch must not cost accuracy.

    python tests/family_errors.py --out family-errors-h100.json        # on a GPU; a row for each family
    python tests/family_errors.py llama t5 --shard 0/2                 # these, or a share of all

Tiny random models with the inputs and paddings of ``families.py``. All three have the same weights, rounded to
bfloat16 once. Error: root mean square over outputs, and over the gradients of all parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from families import find_runs, short, tensors
from family_configs import build, candidates, configs
from family_inputs import masks
from torch import Tensor, nn

from hf_flash_mc.measure.record import describe_run
from hf_flash_mc.patches import patch_model

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gemma4_text",
    "phi3", "olmo2", "cohere2", "granite", "smollm3", "gpt_oss", "llama4_text", "deepseek_v2", "deepseek_v3", "gpt2",
    "gpt_neox", "opt", "starcoder2", "bert", "roberta", "distilbert", "modernbert", "vit", "clip", "siglip", "bart",
    "whisper", "t5", "umt5", "qwen2_5_vl", "gemma3", "bloom", "mpt", "falcon", "gptj", "gpt_neo",
)  # fmt: skip
SEEDS = 8  # one alone tells little where logits are large (Gemma 4: 0.9 to 1.4)


def use_all_experts(config: Any) -> None:
    """Every token to every expert: where rounding picks another one, the error is the router's, not attention's."""
    for part in (config, getattr(config, "text_config", None)):
        count = getattr(part, "num_local_experts", None) or getattr(part, "num_experts", None)
        if count and hasattr(part, "num_experts_per_tok"):
            part.num_experts_per_tok = count


def built(model_type: str, seed: int) -> tuple[nn.Module, list[tuple[str, dict[str, Any]]]]:
    """The first tiny model of a type whose attention can all be reached, and the calls that reach it."""
    error: Any = "no candidate"
    for cls in candidates(model_type)[:3]:
        for config in configs(model_type):
            use_all_experts(config)
            try:
                model = build(cls, config, seed)
                runs, modules, reached, error = find_runs(model)
            except Exception as e:
                error = e
                continue
            if modules and len(reached) == modules:
                return model, runs
    raise RuntimeError(short(error))


def moved(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs on the device, the floating-point ones rounded to bfloat16 and in ``dtype``."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, torch.bfloat16).to(dtype) if x.is_floating_point() else x.to(device)

    return {name: move(x) for name, x in copy.deepcopy(inputs).items()}


def results(model: nn.Module, path: str, inputs: dict[str, Any], rows: Tensor | None) -> tuple[list[Tensor], ...]:
    """Outputs on the rows that count, and gradients, in float64."""
    model.zero_grad()
    out = tensors(model.get_submodule(path)(**inputs))
    if rows is not None:
        out = [t[rows.to(t.device)] for t in out if t.dim() >= 2 and t.shape[:2] == rows.shape]
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=draw).to(t) for t in out]
    terms = [(t * w).mean() for t, w in zip(out, weights, strict=True) if t.requires_grad and t.numel()]
    if terms:
        torch.stack([t.float() if t.dtype != torch.float64 else t for t in terms]).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach().double() for t in out], [g.double() for g in grads]


def errors(model_type: str, device: torch.device) -> dict[str, Any]:
    """RMS errors of stock eager and ours, over all calls of models of some seeds, and their ratios."""
    sums = dict.fromkeys(("output_eager", "output_ours", "gradient_eager", "gradient_ours"), 0.0)
    calls = sum(add_errors(model_type, device, seed, sums) for seed in range(SEEDS))
    row: dict[str, Any] = {"family": model_type, "calls": calls} | {k: v**0.5 for k, v in sums.items()}
    for kind in ("output", "gradient"):
        row[f"{kind}_ratio"] = row[f"{kind}_ours"] / row[f"{kind}_eager"] if row[f"{kind}_eager"] else None
    return row


def add_errors(model_type: str, device: torch.device, seed: int, sums: dict[str, float]) -> int:
    """Squared errors of one model, added to ``sums``; how many calls."""
    model, runs = built(model_type, seed)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no float64
    stock = model.to(device, torch.bfloat16)
    exact, ours = copy.deepcopy(stock).double(), patch_model(copy.deepcopy(stock))
    calls = 0
    for path, inputs in runs:
        for name, given, rows in masks(model.get_submodule(path), inputs):
            try:
                wanted = results(exact, path, moved(given, device, torch.float64), rows)
            except Exception:
                if name == "none":
                    raise
                continue  # it takes no such padding
            calls += 1
            for who, m in (("eager", stock), ("ours", ours)):
                got = results(m, path, moved(given, device, torch.bfloat16), rows)
                for kind, a, b in zip(("output", "gradient"), got, wanted, strict=True):
                    for x, y in zip(a, b, strict=True):
                        ok = y.isfinite()
                        sums[f"{kind}_{who}"] += float((x - y)[ok].square().sum())
    return calls


def rows_of(types: list[str], device: torch.device) -> Iterator[dict[str, Any]]:
    for model_type in types:
        try:
            yield errors(model_type, device)
        except Exception as error:
            yield {"family": model_type, "error": short(error)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: the families that the project names)")
    parser.add_argument("--shard", default="0/1", help="of the types, those of this share")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    index, count = map(int, options.shard.split("/"))
    rows = []
    for row in rows_of((options.types or list(FAMILIES))[index::count], torch.device(options.device)):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        command = " ".join(["python", "tests/family_errors.py", *arguments])
        run = describe_run(torch.device(options.device), command, "RMS errors against float64, bfloat16 weights")
        Path(options.out).write_text(json.dumps({"run": asdict(run), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
