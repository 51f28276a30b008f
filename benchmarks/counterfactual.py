"""Time of scoring V edits of a working context, against V full forwards and against an expanded cache.

python -m benchmarks.counterfactual --shape 135m 3b      # on a GPU: V = 16, P = 8192, S = 128
python -m benchmarks.counterfactual --shape tiny --prefix 256 --suffix 8 --variants 4 --dtype float32

A working context of P slots, of which V are gists, on a random Llama-shaped model. Each variant expands one gist, and
the losses of the next S tokens are wanted. Before anything is timed, the scorer's losses are compared with those of a
session to which the edits are applied one after another.

- ours: `CounterfactualScorer`: keys shared by all variants are read once.
- session: apply, run, and undo each edit.
- full, full-sdpa: a forward over all P + S tokens for each variant, with our attention and with stock sdpa.
- expanded-sdpa: stock transformers: one forward of V rows of S tokens over a cache of P keys repeated V times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.measure import record, timing
from hf_flash_mc.megacontext import CounterfactualScorer, Edits
from hf_flash_mc.megacontext.attach import cache_argument
from hf_flash_mc.megacontext.evaluate import target_losses

BLOCK, RECENT = 32, 64
SHAPES = {  # hidden size, MLP, layers, query and KV heads, vocabulary
    "tiny": (64, 96, 2, 4, 2, 97),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "3b": (2048, 11008, 36, 16, 4, 128256),
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # nats of one token's loss


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    device, rows = torch.device(options.device), []
    for shape in options.shape:
        rows += measure(shape, options, device)
    command = "python -m benchmarks.counterfactual " + " ".join(sys.argv[1:] if arguments is None else arguments)
    run = record.describe_run(device, command, timing.QUICK.text)
    if options.out:
        Path(options.out).write_text(json.dumps({"run": asdict(run), "rows": rows}, indent=1) + "\n")
    for row in rows:
        time, times = row["median_ms"], row["times_ours"]
        print(f"{row['shape']:>5} {row['implementation']:<14} {time:9.2f} ms {times:6.1f} x ours")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["135m"])
    parser.add_argument("--variants", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=8192, help="slots of the working context")
    parser.add_argument("--suffix", type=int, default=128, help="tokens whose loss is wanted")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args(arguments)


def measure(shape: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Check, then time, every way for one shape of model."""
    count, prefix, suffix = options.variants, options.prefix, options.suffix
    model = random_model(shape, prefix + 2 * suffix + BLOCK * count, getattr(torch, options.dtype), device)
    vocabulary = SHAPES[shape][-1]
    ids = torch.randint(vocabulary, (prefix + suffix,), generator=torch.Generator().manual_seed(0))
    stock = stock_calls(model, ids, count, suffix)
    with torch.no_grad():
        samples = {name: timing.sample(call, device, timing.QUICK) for name, call in stock.items()}
    stock.clear()
    attach_megacontext(
        model,
        MegaContextConfig(block_size=BLOCK, w_max=prefix + 2 * suffix + BLOCK * count, recent_tokens=RECENT,
                          lens={"kind": "gist_mass"}),
    )  # fmt: skip
    history = torch.randint(vocabulary, (prefix + (BLOCK - 1) * count,), generator=torch.Generator().manual_seed(1))
    session = model.megacontext.session(observe=0)
    session.ingest(history)
    starts = BLOCK + BLOCK * torch.arange(count) * max(1, (len(history) - RECENT - 2 * BLOCK) // (BLOCK * count))
    session.apply(Edits.of([(-1, int(start), 1) for start in starts]))
    targets, variants = ids[:suffix], [Edits.of([(1, int(start), 1)]) for start in starts]
    scorer = CounterfactualScorer(session)
    error = check(session, scorer, variants, targets, TOLERANCE[options.dtype])
    whole = ids[None].to(device)

    def ours() -> Any:
        return scorer.losses(variants, targets, batch=count)

    def one_by_one() -> Any:
        return edited_losses(session, variants, targets)

    def full() -> Any:
        return [model(whole, logits_to_keep=suffix, use_cache=False) for _ in range(count)]

    with torch.no_grad():
        for name, call in {"ours": ours, "session": one_by_one, "full": full}.items():
            samples[name] = timing.sample(call, device, timing.QUICK)
    base = record.quantile(samples["ours"], 0.5)
    head = {"shape": shape, "variants": count, "prefix": prefix, "suffix": suffix, "dtype": options.dtype}
    return [
        {
            **head,
            "implementation": name,
            **{f"{key}_ms": record.quantile(times, q) for key, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))},
            "times_ours": record.quantile(times, 0.5) / base,
            "error_nats": error,
        }
        for name, times in sorted(samples.items())
    ]


def random_model(shape: str, positions: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama-shaped model with random weights."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(config).to(dtype).eval()


def stock_calls(model: Any, ids: Tensor, count: int, suffix: int) -> dict[str, Callable[[], Any]]:
    """What stock transformers offers."""
    device, prefix = model.device, len(ids) - suffix
    whole = ids[None].to(device)
    rows = whole[:, prefix:].expand(count, -1)
    with torch.no_grad():
        held = DynamicCache(config=model.config)
        model(whole[:, :prefix], logits_to_keep=1, use_cache=True, **{cache_argument(model): held})

    def expanded() -> Any:
        cache = DynamicCache(config=model.config)
        for new, old in zip(cache.layers, held.layers, strict=True):
            new.keys, new.values = (x.repeat_interleave(count, 0) for x in (old.keys, old.values))
            new.is_initialized = True
        return model(rows, logits_to_keep=suffix, use_cache=True, **{cache_argument(model): cache})

    def full() -> Any:
        return [model(whole, logits_to_keep=suffix, use_cache=False) for _ in range(count)]

    return {"expanded-sdpa": expanded, "full-sdpa": full}


def edited_losses(session: Any, variants: list[Edits], targets: Tensor) -> Tensor:
    """Losses [V, S] by editing the session itself."""
    before, found = session.working_context.copy(), []
    for edits in variants:
        session.apply(edits)
        found.append(torch.from_numpy(target_losses(session, targets)))
        session.restore(before)
    return torch.stack(found)


def check(session: Any, scorer: Any, variants: list[Edits], targets: Tensor, tolerance: float) -> float:
    """The largest difference to editing the session, in nats; SystemExit where it is past the tolerance."""
    wanted = edited_losses(session, variants[:2], targets)
    error = float((scorer.losses(variants[:2], targets).double() - wanted).abs().max())
    if not error <= tolerance:
        raise SystemExit(f"wrong: losses differ by {error:.3g} nats, expected at most {tolerance}")
    return error


if __name__ == "__main__":
    sys.exit(main())
