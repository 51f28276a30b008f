"""The table of model types is true: every type of the installed transformers is in it, and samples are run again."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from families import classify, difference, outputs_and_gradients
from family_errors import built, errors
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from typer.testing import CliRunner

from hf_flash_mc.cli import app
from hf_flash_mc.patches import patch_model, table, unpatch_model

ROWS = table.rows()
HERE = [row for row in ROWS.values() if row.model_type in CONFIG_MAPPING_NAMES]
SAME = {row.transformers for row in ROWS.values()} == {transformers.__version__}


# Cheap ones of every kind: adapters, dense and float masks, sparse indices, towers, sound, refusals, nothing to patch.
SAMPLES = (
    "albert", "aimv2", "bloom", "clip", "deepseek_v2", "deepseek_v32", "dinov2", "electra", "esm", "falcon", "gemma3",
    "glm4v_text", "gpt_neo", "gpt_neox", "lasr_encoder", "m2m_100", "modernbert", "mpt", "parakeet_encoder", "phi",
    "glm5_next_text", "qwen2_5_vl", "siglip", "t5gemma2", "wav2vec2", "zoedepth",
    "bark", "deberta", "doge", "longformer", "mpnet", "xglm", "bert-generation", "mamba",
    "blt_local_encoder", "gemma4_assistant", "kimi_linear", "lfm3", "muse_glimmer_assistant", "sam3_detr_encoder",
)  # fmt: skip


def test_no_type_of_the_installed_transformers_is_unclassified():
    new = sorted(CONFIG_MAPPING_NAMES.keys() - ROWS.keys())
    if SAME:
        assert not new
    elif new:
        warnings.warn(f"model types that the table does not hold: {', '.join(new)}", stacklevel=1)
    assert {row.verdict for row in ROWS.values()} <= table.MEANING.keys() - {"not run"}
    assert [row.model_type for row in ROWS.values() if row.verdict in ("refused", "not run") and not row.reason] == []


def test_the_table_is_what_the_modeling_files_say():
    """By their text alone: a family that moves to or from the interface has to be run again."""
    if not SAME:
        pytest.skip(f"the table was made with other versions than {transformers.__version__}")
    moved = [row.model_type for row in HERE if table.route_of(row.model_type) != row.route]
    assert not moved


def test_nine_of_ten_types_on_the_interface_are_exact():
    through = [row for row in ROWS.values() if row.modules and "own code" not in row.reason]
    assert sum(row.verdict == "exact" for row in through) >= 0.9 * len(through)


@pytest.mark.parametrize("model_type", SAMPLES)
def test_samples_of_the_table(model_type):
    row = ROWS[model_type]
    if model_type not in CONFIG_MAPPING_NAMES or not (SAME or row.oldest == row.verdict):
        pytest.skip(f"not the same in transformers {transformers.__version__}")
    torch.manual_seed(0)
    verdict = classify(model_type)
    assert verdict.verdict == row.verdict, verdict
    if verdict.verdict == "refused" and SAME:
        assert verdict.reason == row.reason


def test_the_command_and_the_page_show_the_table():
    from families import DOCS

    assert DOCS.read_text() == table.markdown()
    shown = CliRunner().invoke(app, ["models", "deberta"])
    assert "deberta-v2: refused" in shown.stdout
    assert "types whose attention modules all go through the interface" in CliRunner().invoke(app, ["models"]).stdout


def test_glm_5_next_over_padding_with_holes_is_stock_sdpa():
    """Rows of padding see no key, which its code says by the lowest number; in pools of keys they reach rows that
    count. Stock eager makes means of all values of them, and differs from stock sdpa."""
    model, runs = built("glm5_next_text", 0)
    [(path, inputs)] = runs
    rows = torch.ones(inputs["input_ids"].shape, dtype=torch.bool)
    rows[0, 1::3] = False
    inputs = {**inputs, "attention_mask": rows.long()}
    model.set_attn_implementation("sdpa")
    expected = outputs_and_gradients(model, path, inputs, rows)
    assert difference(outputs_and_gradients(patch_model(model), path, inputs, rows), expected) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_bfloat16_costs_no_more_accuracy_than_eager(model_type):
    row = errors(model_type, torch.device("cpu"))
    assert row["calls"] >= 3
    assert row["output_ratio"] <= 1.2
    assert row["gradient_ratio"] <= 1.2


def test_attention_that_is_causal_by_name_alone_is_refused():
    """Kosmos 2 up to transformers 5.17; newer ones say False."""
    model, _ = built("kosmos-2", 0)
    model.image_to_text_projection.x_attn.is_causal = True
    with pytest.raises(NotImplementedError, match="Kosmos2ImageToTextProjection calls itself causal"):
        patch_model(model)
    model.image_to_text_projection.x_attn.is_causal = False
    unpatch_model(patch_model(model))
