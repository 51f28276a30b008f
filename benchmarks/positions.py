"""What compressed positions cost: the loss of next tokens with slots at their own positions, and renumbered.

python -m benchmarks.positions --tokens data/python-docs-held-out.npy --windows 50 --out positions-h100.json

A history of ``--context`` tokens that still fits the model's range is read into a window of ``--window`` slots. The
loss of the next 64 tokens is measured with every slot at its own position (absolute), then after the same slots were
renumbered as if the range were only so long (``--ranges``): what becomes of them once a history outgrows the range.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.measure import record
from hf_flash_mc.megacontext.states import TARGETS, target_losses
from hf_flash_mc.megacontext.training import Windows

ABSOLUTE = "absolute"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    given = sys.argv[1:] if arguments is None else arguments
    method = f"{options.context} tokens in {options.window} slots"
    run = record.describe_command(device, ["python", "-m", "benchmarks.positions"], given, method, options.dtype)
    record.keep(measured(options), run, options.out, record.in_words)
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--tokens", required=True, help="a file of prepare_tokens.py")
    parser.add_argument("--windows", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--context", type=int, default=8000, help="tokens of history (default 8000)")
    parser.add_argument("--window", type=int, default=1024, help="slots of the working context (default 1024)")
    parser.add_argument("--ranges", type=int, nargs="+", default=[7168, 4096, 2048], help="ranges to renumber into")
    parser.add_argument("--block", type=int, default=32, help="tokens of a gist (default 32)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args(arguments)
    if not options.window + TARGETS <= min(options.ranges) <= max(options.ranges) < options.context:
        parser.error(f"--ranges: expected window + {TARGETS} or more, and less than the context, got {options.ranges}")
    return options


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of each window, mean nats of a target in every numbering."""
    folder = options.model
    if folder is None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
        from smollm2 import smollm2_folder  # type: ignore[import-not-found]

        folder = str(smollm2_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).to(options.device).eval()
    config = MegaContextConfig(
        w_max=options.window, block_size=options.block, sink_tokens=options.block, recent_tokens=TARGETS,
        positions="absolute", lens={"kind": "gist_mass"},
    )  # fmt: skip
    attach_megacontext(model, config)
    windows = Windows(options.tokens, length=options.context + TARGETS).apart(options.windows)
    for ids in windows:
        session = model.megacontext.session()
        session.ingest(ids[:-TARGETS])
        session.make_room(TARGETS)
        row = {ABSOLUTE: float(target_losses(session, ids[-TARGETS:]).mean())}
        for limit in options.ranges:
            session.memory.config = replace(session.config, positions="compressed", max_position_embeddings=limit)
            session.memory.renumber(session.working_context, TARGETS)
            row[f"in {limit}"] = float(target_losses(session, ids[-TARGETS:]).mean())
        session.close()
        yield row


if __name__ == "__main__":
    raise SystemExit(main())
