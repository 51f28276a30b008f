"""Questions that come and end at different times share every forward: transformers' generate_batch on our ops.

    python examples/generate_batch.py                  # SmolLM2-135M from a Python package
    python examples/generate_batch.py --model FOLDER   # any causal language model that from_pretrained reads

Prints the answers; ends with exit code 1 if one differs from what the stock model generates for that question alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from hf_flash_mc import patch_model, patch_report

QUESTIONS = ("Why is the sky blue?", "What is a cat?", "Name three rivers of Europe and the seas they flow into.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; without it SmolLM2-135M-Instruct is fetched")
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args()
    if options.model is None:
        from smollm2 import smollm2_folder

        options.model = smollm2_folder()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    prompts = [read(tokenizer, question) for question in QUESTIONS]
    greedy = GenerationConfig.from_model_config(model.config)
    greedy.update(max_new_tokens=options.new_tokens, do_sample=False)

    stock = [model.generate(torch.tensor([p], device=device), generation_config=greedy)[0, len(p) :] for p in prompts]
    patch_model(model, continuous_batching=True)
    plan = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)  # by default most of the memory is cache
    results = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=plan).values()

    for question, result in zip(QUESTIONS, results, strict=True):
        print(f"{question}\n    {tokenizer.decode(result.generated_tokens, skip_special_tokens=True).strip()}")
    print(patch_report(model))
    return int([r.generated_tokens for r in results] != [tokens.tolist() for tokens in stock])


def read(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question, as a chat where the model is made for one."""
    if tokenizer.chat_template is None:
        return tokenizer(question).input_ids
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True).input_ids


if __name__ == "__main__":
    raise SystemExit(main())
