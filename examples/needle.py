"""Needles in a long history: is a number found again that the window no longer shows?

    python examples/needle.py                                                   # one short history, on a CPU in minutes
    python examples/needle.py --lengths 8192 32768 131072 --per-cell 50 --window 2048 --workers 8  # in full, for a GPU

Sentences with random numbers for different names are spread over filler text, each name at one of five depths. After
all of it was read, each number is asked for, starting from the same working context:

- exact: the blocks of the needle are expanded by hand: about the ceiling of this model and prompt;
- random, gist_mass, recall, ...: after ``--rounds`` refocuses by that lens, which sees only the question.

A number counts as found if greedy decoding gives every digit. Prints a table, writes ``--out`` and draws ``--plot``. A
run that was stopped goes on from OUT.part with the same command. ``--workers`` reads so many histories side by side, on
one GPU: what is found is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from megacontext_chat import dtype_on, load
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.measure.record import describe_command, without_folders
from hf_flash_mc.megacontext import Edits
from hf_flash_mc.megacontext.io import load_gist
from hf_flash_mc.megacontext.lensnet import KINDS
from hf_flash_mc.megacontext.plots import plot_needles
from hf_flash_mc.megacontext.quality import needle_shares, needle_table
from hf_flash_mc.megacontext.states import heads_config

NEEDLE = "\n\nRemember this: the secret number of {name} is {code}. The secret number of {name} is {code}.\n\n"
QUESTION = "\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
SYLLABLES = ("ba", "do", "fe", "gi", "hu", "ka", "le", "mo", "ni", "po", "ra", "so", "ti", "vu", "za")
DEPTHS = 5
SPACING = 1600  # tokens of filler for each needle


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    found = Found(options, arguments)
    lengths = sorted(options.lengths, reverse=True)  # so that no worker is left alone with a long one at the end
    wanted = [(length, seed) for length in lengths for seed in range(histories(length, options.per_cell))]
    wanted = [history for history in wanted if not found.has(*history)]
    begun = time.perf_counter()
    for length, seed, rows in read(wanted, options):
        found.add([{"length": length, "history": seed, **row} for row in rows])
        done, whole = found.count(length), histories(length, options.per_cell) * needles(length)
        print(f"[{time.perf_counter() - begun:.0f} s] {length} tokens: {done} of {whole} needles", flush=True)
    found.finish()
    print(needle_table(found.results, found.ways), flush=True)
    if options.plot:
        plot_needles(needle_shares(found.results, found.ways), options.plot)


def needles(length: int) -> int:
    """In a history: as many at each depth."""
    return max(DEPTHS, length // SPACING // DEPTHS * DEPTHS)


def histories(length: int, per_cell: int) -> int:
    """As many as hold ``per_cell`` needles at each depth."""
    return -(-DEPTHS * per_cell // needles(length))


def read(wanted: list[tuple[int, int]], options: argparse.Namespace) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """Length, number and answers of each history, as they come."""
    if options.workers == 1:
        start(options)
        yield from map(read_one, wanted)
        return
    with get_context("spawn").Pool(options.workers, start, (options,)) as pool:  # CUDA cannot be used in a fork
        yield from pool.imap_unordered(read_one, wanted)


class Reader:
    """The model, and what histories are made of."""

    def __init__(self, options: argparse.Namespace) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.options = options
        self.tokenizer, self.model = load(options)
        config = MegaContextConfig(w_max=options.window, lens={"kind": "recall"}, max_edits=options.edits)
        if options.heads:
            held = heads_config(options.heads)
            config = replace(config, block_size=held.block_size, gist=held.gist)
        attach_megacontext(self.model, config)
        if options.heads:
            load_gist(self.model.megacontext, options.heads)
        text = "\n\n".join(topics[n] for n in sorted(topics))
        self.filler = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


reader: Reader  # of this process


def start(options: argparse.Namespace) -> None:
    global reader
    reader = Reader(options)


def read_one(history: tuple[int, int]) -> tuple[int, int, list[dict[str, Any]]]:
    return *history, one_history(reader.model, reader.tokenizer, reader.filler, *history, reader.options)


class Found:
    """The answers so far. With ``--out`` they are kept in OUT.part, from which the same command goes on."""

    def __init__(self, options: argparse.Namespace, arguments: list[str] | None) -> None:
        self.out = None if options.out is None else Path(options.out)
        self.ways = ["exact", "no refocus", *options.lenses]
        self.results: list[dict[str, Any]] = []
        device = torch.device(options.device)
        given = sys.argv[1:] if arguments is None else arguments
        run = describe_command(device, ["python", "examples/needle.py"], given, "greedy decoding", dtype_on(device))
        self.about = {"run": run, "options": without_folders(vars(options)), "ways": self.ways}
        for path in (self.out, options.plot):
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
        if self.out is not None and self.part.exists():
            held = json.loads(self.part.read_text())
            if held["options"] == self.about["options"] and held["run"]["commit"] == run["commit"]:
                self.results = held["results"]
                print(f"going on from {self.part}: {len(self.results)} needles", flush=True)

    @property
    def part(self) -> Path:
        return self.out.with_name(self.out.name + ".part")

    def count(self, length: int) -> int:
        return sum(row["length"] == length for row in self.results)

    def has(self, length: int, history: int) -> bool:
        return any((row["length"], row["history"]) == (length, history) for row in self.results)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.results += rows
        if self.out is not None:
            fresh = self.out.with_name(self.out.name + ".new")
            fresh.write_text(json.dumps({**self.about, "results": self.results}) + "\n")
            fresh.replace(self.part)

    def finish(self) -> None:
        """Lengths as they were given, histories in order, whichever was read first."""
        order = self.about["options"]["lengths"]
        self.results.sort(key=lambda row: (order.index(row["length"]), row["history"], row["depth"]))
        if self.out is not None:
            self.add([])  # in that order
            self.part.replace(self.out)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
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
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a model of its own (default 1)")
    options = parser.parse_args(arguments)
    for name in ("lengths", "per_cell", "window", "rounds", "edits", "digits", "workers"):
        if min([given] if isinstance(given := getattr(options, name), int) else given) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {given}")
    return options


def one_history(
    model: Any, tokenizer: Any, filler: Tensor, length: int, seed: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Read one history with several needles and ask for each in every way."""
    rng = random.Random(f"{length} {seed}")
    count = needles(length)
    names = make_names(rng, count)
    codes = ["".join(rng.choice("0123456789") for _ in range(options.digits)) for _ in names]
    texts = [encode(tokenizer, NEEDLE.format(name=n, code=c)) for n, c in zip(names, codes, strict=True)]
    share = (length - sum(map(len, texts))) // (count + 1)
    if share < 1:
        least = sum(map(len, texts)) + count + 1
        raise SystemExit(f"--lengths: expected at least {least} tokens, which hold {count} needles, got {length}")
    parts, places = [], []
    offset = rng.randrange(len(filler))
    for text in texts:
        parts.append(filler.roll(-offset)[:share])
        offset += share
        places.append(sum(map(len, parts)))
        parts.append(text)
    parts.append(filler.roll(-offset)[:share])
    session = model.megacontext.session(seed=seed)
    session.ingest(torch.cat(parts), progress=sys.stderr.isatty())
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


if __name__ == "__main__":
    main()
