"""Time of MegaContext's parts: lenses over 8192 entries, gists of a long text, and a refocus beside decoding.

python -m benchmarks.megacontext --out megacontext-h100.json      # on a GPU
python -m benchmarks.megacontext --shape tiny --entries 64 --size 64 --window 320 --dtype float32   # on a CPU

- lens: one score of ``--entries`` entries of size ``--size``; on a GPU by `GraphedLens`, compiled.
- gist: tokens per second that become gists, embeddings or keys and values of all layers of ``--shape``.
- refocus: `MegaContextSession.refocus` of a full working context of ``--window`` slots, by the default lens and by a
  random one, which always has edits.
- decoding: a step over a static cache of as many keys, compiled, which takes longest and so comes last.
  The overhead is one refocus against the steps between two.

``--only`` chooses among them; the file is written anew after each line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.counterfactual import SHAPES, random_model
from hf_flash_mc import MegaContextConfig, attach_megacontext, detach_megacontext, patch_model
from hf_flash_mc.measure import record, timing
from hf_flash_mc.megacontext.attach import cache_argument
from hf_flash_mc.megacontext.gistnet import EmbeddingGist, KVGist
from hf_flash_mc.megacontext.lens_graph import GraphedLens
from hf_flash_mc.megacontext.lensnet import KINDS, DualLens, LensInput, TransformerLens
from hf_flash_mc.megacontext.rope import Rope

REPEATS, WARMUP = 15, 3
SECTIONS = ("lens", "gist", "refocus", "decoding")
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    given, method = sys.argv[1:] if arguments is None else arguments, f"median, p20 and p80 of {REPEATS} samples"
    run = record.describe_command(device, ["python", "-m", "benchmarks.megacontext"], given, method, options.dtype)
    record.keep(measured(options, device), run, options.out, record.in_words)
    return 0


def measured(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The rows of the sections that were asked for; those of refocuses get their overhead with the last one."""
    if "lens" in options.only:
        yield from lenses(options, device)
    if "gist" in options.only:
        yield from gists(options, device)
    found: list[Row] = []
    if {"refocus", "decoding"} & {*options.only}:
        model = random_model(options.shape, 2 * options.window, getattr(torch, options.dtype), device)
    if "refocus" in options.only:
        for row in refocuses(model, options, device):
            found.append(row)
            yield row
    if "decoding" in options.only:
        times = spread(decode_step(model, options.window), device)
        for row in found:
            row["overhead"] = row["median_ms"] / (row["interval"] * times["median_ms"])
            print(f"{row['part']}: overhead {row['overhead']:.2%}")
        yield {"part": "decoding step, static cache, compiled", "keys": options.window, **times}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="what is measured (all)")
    parser.add_argument("--shape", choices=SHAPES, default="3b", help="of the model that refocuses")
    parser.add_argument("--entries", type=int, default=8192)
    parser.add_argument("--size", type=int, default=2048, help="of embeddings, for lenses and embedding gists")
    parser.add_argument("--window", type=int, default=8192, help="slots of the working context that is refocused")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args(arguments)


def lenses(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Milliseconds of one score."""
    dtype, n, size = getattr(torch, options.dtype), options.entries, options.size
    config = MegaContextConfig(hidden_size=size, lens={"kind": "dual"})
    inputs = LensInput(
        start=torch.arange(n, device=device), lod=torch.zeros(n, dtype=torch.int64, device=device), cursor=n,
        entries=torch.randn(n, size, device=device, dtype=dtype), tail=torch.randn(6, size, device=device, dtype=dtype),
        attention_mass=torch.rand(n, device=device),
    )  # fmt: skip
    for kind, make in {"dual": DualLens, "transformer": TransformerLens}.items():
        lens = make(config).to(device, dtype).eval()
        with torch.no_grad():
            score = lens.score if device.type == "cpu" else GraphedLens(lens, n, compiled=True).score
            yield {"part": f"lens, {kind}", "entries": n, **spread(lambda s=score: s(inputs), device)}


def gists(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Tokens per second."""
    dtype, block = getattr(torch, options.dtype), 32
    config = MegaContextConfig(hidden_size=options.size)
    net = EmbeddingGist(config).to(device, dtype).eval()
    windows = torch.randn(max(1, options.entries // block) * 4, block, options.size, device=device, dtype=dtype)
    times = spread(lambda: net.pool(windows, lod=1), device)
    yield {"part": "gist, embedding", **times, "tokens_per_s": windows.shape[0] * block / times["median_ms"] * 1e3}
    width, _, layers, heads, kv_heads, _ = SHAPES[options.shape]
    dim = width // heads
    config = MegaContextConfig(num_layers=layers, num_kv_heads=kv_heads, head_dim=dim,
                               gist={"pooling": "query", "rank": 64})  # fmt: skip
    rope = Rope(1e4 ** (-torch.arange(0, dim, 2, device=device) / dim)[None], torch.ones(1, device=device))
    kv = KVGist(config, rope).to(device, dtype).eval()
    count = max(1, options.entries // block)
    payload = torch.randn(count, block, layers, 2, kv_heads, dim, device=device, dtype=dtype)
    places = torch.arange(count * block, device=device).view(count, block)
    times = spread(lambda: kv.pool(payload, lod=1, positions=places), device)
    yield {"part": "gist, keys and values", **times, "tokens_per_s": count * block / times["median_ms"] * 1e3}


def refocuses(model: Any, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Milliseconds of a refocus."""
    window = options.window
    config = MegaContextConfig(w_max=window)
    attach_megacontext(model, config)
    session = model.megacontext.session()
    session.ingest(torch.randint(3, SHAPES[options.shape][-1], (window + window // 2,)))
    for kind in ("recall", "random"):
        session.addon.lens = KINDS[kind](session.config)
        edits: list[int] = []
        times = spread(lambda done=edits: done.append(sum(map(len, session.refocus()))), device)
        row = {"part": f"refocus, {kind} lens", "slots": len(session.working_context), **times}
        yield {**row, "edits": sum(edits) / len(edits), "interval": config.refocus_interval}
    detach_megacontext(model)


def decode_step(model: Any, keys: int) -> Callable[[], Any]:
    """One token after ``keys`` others by the patched model, compiled where there is a GPU."""
    patch_model(model)
    cache = StaticCache(config=model.config, max_cache_len=keys + 64)
    ids = torch.randint(3, model.config.vocab_size, (1, keys), device=model.device)
    with torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True) if model.device.type == "cuda" else model
    token, place = ids[:, :1], torch.tensor([[keys]], device=model.device)

    def step() -> Any:
        with torch.no_grad():
            return forward(token, position_ids=place, use_cache=True, **{cache_argument(model): cache}).logits

    return step


def spread(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of calls that end when the device is done."""
    return timing.spread(call, device, REPEATS, WARMUP)


if __name__ == "__main__":
    sys.exit(main())
