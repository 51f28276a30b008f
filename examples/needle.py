"""Needles in a long history: is a number found again that the window no longer shows?

    python examples/needle.py                                                   # one short history, on a CPU in minutes
    python examples/needle.py --lengths 8192 32768 131072 --per-cell 50 --window 2048  # in full, for a GPU

Sentences with random numbers for different names are spread over filler text, each name at one of five depths. After
all of it was read, each number is asked for, starting from the same working context:

- exact: the blocks of the needle are expanded by hand, which is the ceiling of this model and prompt;
- random, gist_mass, recall, ...: after ``--rounds`` refocuses by that lens, which sees only the question.

A number counts as found if greedy decoding gives every digit. Prints a table and draws ``--plot``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any

import torch
from megacontext_chat import load
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.megacontext import Edits
from hf_flash_mc.megacontext.io import load_gist
from hf_flash_mc.megacontext.lensnet import KINDS
from hf_flash_mc.megacontext.states import heads_config

NEEDLE = "\n\nRemember this: the secret number of {name} is {code}. The secret number of {name} is {code}.\n\n"
QUESTION = "\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
SYLLABLES = ("ba", "do", "fe", "gi", "hu", "ka", "le", "mo", "ni", "po", "ra", "so", "ti", "vu", "za")
DEPTHS = 5
SPACING = 1600  # tokens of filler for each needle


def main() -> None:
    options = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer, model = load(options)
    config = MegaContextConfig(w_max=options.window, lens={"kind": "recall"}, max_edits=options.edits)
    if options.heads:
        held = heads_config(options.heads)
        config = replace(config, block_size=held.block_size, gist=held.gist)
    attach_megacontext(model, config)
    if options.heads:
        load_gist(model.megacontext, options.heads)
    filler = tokenizer("\n\n".join(topics[n] for n in sorted(topics)), return_tensors="pt", verbose=False).input_ids[0]
    results: list[dict[str, Any]] = []
    start = time.perf_counter()
    for length in options.lengths:
        asked, seed = 0, 0
        while asked < DEPTHS * options.per_cell:
            found = one_history(model, tokenizer, filler, length, seed, options)
            asked, seed = asked + len(found), seed + 1
            results += found
            if options.out:
                with open(options.out, "w") as file:
                    json.dump({"options": vars(options), "results": results}, file)
            print(f"[{time.perf_counter() - start:.0f} s] {length} tokens, {asked} needles", flush=True)
        print(table(results, options.lenses), flush=True)
    if options.plot:
        draw(results, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens of history")
    parser.add_argument("--per-cell", type=int, default=1, help="needles for each length and depth (default 1)")
    parser.add_argument("--window", type=int, default=1024, help="slots of the working context (default 1024)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--edits", type=int, default=4, help="expansions of one refocus (default 4)")
    parser.add_argument("--lenses", nargs="*", default=["random", "gist_mass", "recall"], choices=sorted(KINDS))
    parser.add_argument("--heads", help="folder of trained gists, such as heads/smollm2-135m-instruct/kv-32")
    parser.add_argument("--digits", type=int, default=5)
    parser.add_argument("--out", help="JSON file for every answer")
    parser.add_argument("--plot", help="picture of the table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def one_history(
    model: Any, tokenizer: Any, filler: Tensor, length: int, seed: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Read one history with several needles and ask for each in every way."""
    rng = random.Random(f"{length} {seed}")
    count = max(DEPTHS, length // SPACING // DEPTHS * DEPTHS)
    names = make_names(rng, count)
    codes = ["".join(rng.choice("0123456789") for _ in range(options.digits)) for _ in names]
    parts, places = [], []
    share = (length - count * 45) // (count + 1)  # a needle has about 45 tokens
    offset = rng.randrange(len(filler))
    for name, code in zip(names, codes, strict=True):
        parts.append(filler.roll(-offset)[:share])
        offset += share
        places.append(sum(map(len, parts)))
        parts.append(encode(tokenizer, NEEDLE.format(name=name, code=code)))
    parts.append(filler.roll(-offset)[:share])
    session = model.megacontext.session(seed=seed)
    session.ingest(torch.cat(parts))
    found = []
    for i, (name, code, place) in enumerate(zip(names, codes, places, strict=True)):
        question = encode(tokenizer, QUESTION.format(name=name))
        whole = encode(tokenizer, QUESTION.format(name=name) + f" {code}")
        span = (place, place + len(parts[2 * i + 1]))
        row: dict[str, Any] = {"length": length, "depth": i * DEPTHS // count}
        for way in ("exact", "no refocus", *options.lenses):
            row[way] = ask(session, way, question, whole[len(question) :], span, options.rounds)
        found.append(row)
    return found


def make_names(rng: random.Random, count: int) -> list[str]:
    """Distinct made-up names of three syllables."""
    names: set[str] = set()
    while len(names) < count:
        names.add("".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize())
    return rng.sample(sorted(names), count)


def encode(tokenizer: Any, text: str) -> Tensor:
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]


def ask(session: Any, way: str, question: Tensor, digits: Tensor, span: tuple[int, int], rounds: int) -> bool:
    """Whether greedy decoding gives the digits; leaves the session as it was."""
    before, allocation, lens = session.working_context.copy(), session.allocation, session.addon.lens
    room = len(question) + len(digits)
    session.make_room(room)
    if way == "exact":
        expand_span(session, *span, room)
    session.ingest(question)
    if way in KINDS:
        session.addon.lens = KINDS[way](session.config)
        session.refocus(rounds=rounds, reread=len(question))
    logits = [session.next_logits()[None].cpu(), session.ingest(digits[:-1], return_logits=True)]
    right = bool((torch.cat(logits).argmax(-1) == digits).all())
    session.rewind(len(question) + len(digits) - 1)
    session.restore(before)
    session.allocation, session.addon.lens = allocation, lens
    return right


def expand_span(session: Any, start: int, stop: int, room: int) -> None:
    """Show the tokens [start, stop) exactly, making room by collapsing elsewhere; ``room`` slots stay free."""
    config = session.config
    for lod in range(config.max_lod, 0, -1):
        wc = session.working_context
        hit = (wc.lod == lod) & (wc.start < stop) & (wc.start + wc.span > start)
        for first in wc.start[hit].tolist():
            wc = session.working_context
            around = (wc.start < stop + config.span(lod)) & (wc.start + wc.span > start - config.span(lod))
            session.make_room(config.block_size + room, torch.from_numpy(around * 2.0 - 1.0), tokens=room)
            session.apply(Edits.of([(1, first, lod)]))


def table(results: list[dict[str, Any]], lenses: list[str]) -> str:
    """Found needles by length, and by depth in brackets."""
    ways = ["exact", "no refocus", *lenses]
    lines = ["| tokens | needles | " + " | ".join(ways) + " |", "|---" * (2 + len(ways)) + "|"]
    for length in sorted({row["length"] for row in results}):
        rows = [row for row in results if row["length"] == length]
        cells = []
        for way in ways:
            depths = [[row[way] for row in rows if row["depth"] == d] for d in range(DEPTHS)]
            by_depth = " ".join(f"{sum(found) / max(len(found), 1):.0%}" for found in depths)
            cells.append(f"{sum(row[way] for row in rows) / len(rows):.0%} ({by_depth})")
        lines.append(f"| {length} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    from hf_flash_mc.megacontext.plots import plot_needles

    lines: dict[str, list[tuple[int, float, float]]] = {}
    for way in ("exact", "no refocus", *options.lenses):
        for length in sorted({row["length"] for row in results}):
            hits = [row[way] for row in results if row["length"] == length]
            share = sum(hits) / len(hits)
            lines.setdefault(way, []).append((length, share, (share * (1 - share) / len(hits)) ** 0.5))
    plot_needles(lines, options.plot)


if __name__ == "__main__":
    main()
