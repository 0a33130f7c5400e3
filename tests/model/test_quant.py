"""int8 weights: the right products on both sides of the row switch, memory let go, and clear refusals."""

from __future__ import annotations

import copy
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from sailvl import cli
from sailvl.model import checkpoint, quant
from sailvl.model.quant import SWITCH, Int8Embedding, Int8Linear, quantize


def exact(layer: Int8Linear, rows: torch.Tensor) -> torch.Tensor:
    """The product in fp64."""
    found = rows.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T
    return found if layer.bias is None else found + layer.bias.double()


def int8_linear(outputs: int, width: int, dtype: torch.dtype, *, bias: bool = False) -> Int8Linear:
    torch.manual_seed(0)
    linear = nn.Linear(width, outputs, bias=bias, dtype=dtype)
    return Int8Linear(*quant._int8(linear.weight, "here"), bias=linear.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 3, SWITCH - 1, SWITCH, 70])
@pytest.mark.parametrize("shape", [(64, 32), (37, 96), (50, 33), (5, 80), (2500, 1024)])
def test_products_are_right_on_both_sides_of_the_switch_and_for_odd_shapes(dtype, rows, shape) -> None:
    layer = int8_linear(*shape, dtype)
    hidden = torch.randn(rows, shape[1]).to(dtype)
    found, right = layer(hidden), exact(layer, hidden)
    assert found.dtype == dtype and found.shape == (rows, shape[0])
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (found.double() - right).norm() <= limit * right.norm()


def test_leading_dimensions_biases_and_strided_inputs() -> None:
    layer = int8_linear(24, 32, torch.float32, bias=True)
    hidden = torch.randn(3, 64, 2)[:, ::2].transpose(1, 2)
    found = layer(hidden)
    assert found.shape == (3, 2, 24)
    assert torch.allclose(found.double(), exact(layer, hidden.reshape(-1, 32)).view(3, 2, 24), atol=1e-5)


def test_a_row_is_off_by_about_a_percent_whatever_its_scale() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(300, 2048) * torch.logspace(-4, 2, 300)[:, None]).bfloat16()
    found, scale = quant._int8(weight, "here")
    error = (found.float() * scale.float()[:, None] - weight.float()).norm(dim=1) / weight.float().norm(dim=1)
    assert 0.002 < error.min() and error.max() < 0.013
    assert found.abs().max() <= 127


def test_rows_of_zeros_stay_zero_and_weights_that_are_not_finite_are_named() -> None:
    weight = torch.randn(4, 32)
    weight[2] = 0
    found, scale = quant._int8(weight, "here")
    assert not found[2].any() and scale.isfinite().all()
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight[1, 5] = bad
        with pytest.raises(ValueError, match=r"q_proj.*not finite"):
            quant._int8(weight, "q_proj")


def test_without_a_working_kernel_blocks_do_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = int8_linear(70, 96, torch.float32)
    hidden = torch.randn(2, 96)
    right = exact(layer, hidden)
    calls = []

    def missing(*args):
        raise NotImplementedError("no such kernel")

    def wrong(rows, weight, scale):
        calls.append(1)
        return rows @ weight.float().T

    for broken in (missing, wrong):
        quant.kernel_works.cache_clear()
        monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", broken, raising=False)
        assert not quant.kernel_works(torch.float32)
        tried = len(calls)
        assert torch.allclose(layer(hidden).double(), right, atol=1e-5)
        assert len(calls) == tried  # found wrong once, never asked again
    monkeypatch.undo()
    quant.kernel_works.cache_clear()


@pytest.fixture(scope="module")
def wide_model():
    """Four wide layers, bf16, fresh weights of the usual size, tied."""
    config = checkpoint.config_for(
        "nano",
        lm={
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 128, "initializer_range": 0.02, "vocab_size": 2048,
        },
    )  # fmt: skip
    return checkpoint.build(config, seed=0).eval().bfloat16()


@pytest.fixture(params=["tiny", "wide"])
def model(request: pytest.FixtureRequest, tiny_model, wide_model):
    return copy.deepcopy(tiny_model if request.param == "tiny" else wide_model)


@pytest.mark.parametrize("tokens", [SWITCH - 4, 60])
def test_logits_point_where_they_pointed(model, tokens: int) -> None:
    ids = torch.arange(tokens)[None] % 250
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        assert quantize(model) is model
        after = model(input_ids=ids).logits
    assert after.dtype == before.dtype
    cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    assert cosine.mean() > 0.999 and cosine.min() > 0.998
    assert not torch.equal(before, after)


def test_only_the_language_model_changes_and_the_tied_table_exists_once(wide_model) -> None:
    model = copy.deepcopy(wide_model)
    pixels = torch.randn(1, 3, 112, 112)
    with torch.inference_mode():
        features = model.get_image_features(pixels).pooler_output
        quantize(model)
        assert torch.equal(model.get_image_features(pixels).pooler_output, features)
    lm = model.model.language_model
    assert lm.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert not [name for name, value in lm.named_parameters() if value.ndim > 1]
    assert {type(module) for module in lm.modules()}.isdisjoint({nn.Linear, nn.Embedding})
    assert lm.embed_tokens(torch.tensor([[3, 5]])).shape == (1, 2, 768)
    assert model.dtype == torch.bfloat16 and isinstance(model.lm_head, quant.Int8Linear)
    assert not isinstance(wide_model.lm_head, quant.Int8Linear)
    before = [value.data_ptr() for value in model.buffers()]
    assert [value.data_ptr() for value in quantize(model).buffers()] == before  # again: nothing to do


def test_an_untied_table_and_head_keep_their_own_rows(tiny_processor) -> None:
    config = checkpoint.config_for("nano", processor=tiny_processor, lm={"tie_word_embeddings": False})
    model = checkpoint.build(config, seed=0).eval()
    table, head = (module.weight.detach().clone() for module in (model.get_input_embeddings(), model.lm_head))
    quantize(model)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    found = model.get_input_embeddings()(torch.arange(len(table)))
    assert (found - table).norm() < 0.01 * table.norm()
    rows = model.lm_head.weight.float() * model.lm_head.scale[:, None]
    assert (rows - head).norm() < 0.01 * head.norm()


def test_each_weight_is_gone_before_the_next_is_made(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny_model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied: every matrix for itself
    original, seen = quant._int8, []

    def watched(weight: torch.Tensor, name: str):
        seen.append(weakref.ref(weight))
        # This one, and head and table that are replaced together.
        assert sum(ref() is not None for ref in seen) <= 2
        return original(weight, name)

    monkeypatch.setattr(quant, "_int8", watched)
    quantize(model)
    assert len(seen) == 2 + 2 * 7 and all(ref() is None for ref in seen)


def test_generation_runs_through_both_ways_of_computing(tiny_model) -> None:
    model = quantize(copy.deepcopy(tiny_model))
    ids = torch.arange(SWITCH + 9)[None] + 5
    found = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=[])
    assert found.shape == (1, SWITCH + 13)


def test_what_cannot_be_quantised_or_saved_is_refused(tiny_model, tiny_processor, tmp_path) -> None:
    moe = checkpoint.build(checkpoint.config_for("nano-moe", processor=tiny_processor), seed=0)
    with pytest.raises(ValueError, match="qwen3_moe"):
        quantize(moe)
    with pytest.raises(ValueError, match="float16"):
        quantize(copy.deepcopy(tiny_model).half())
    with pytest.raises(ValueError, match="the model is on meta"):
        quantize(copy.deepcopy(tiny_model).to("meta"))
    model = quantize(copy.deepcopy(tiny_model))
    with pytest.raises(checkpoint.CheckpointError, match="cannot be saved"):
        checkpoint.save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_ask_answers_in_int8(
    tiny_model, tiny_processor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "model")
    moe = checkpoint.build(checkpoint.config_for("nano-moe", processor=tiny_processor), seed=0)
    checkpoint.save(moe, tiny_processor, tmp_path / "moe")
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    made = []
    monkeypatch.setattr(quant, "quantize", lambda model: made.append(quantize(model)) or made[-1])

    def ask(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sailvl", "ask", str(tmp_path / "red.png"), "What?", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    code, out, _ = ask("--model", str(tmp_path / "model"), "--quant", "int8", "--json", "--max-new-tokens", "3")
    assert code == 0 and json.loads(out)["tokens"] >= 1
    assert isinstance(made[0].lm_head, quant.Int8Linear) and made[0].model.vision_tower.dtype == torch.bfloat16
    code, _, err = ask("--model", str(tmp_path / "moe"), "--quant", "int8")
    assert code == 2 and "qwen3_moe" in err
    code, _, err = ask("--model", str(tmp_path / "model"), "--quant", "int4")
    assert code == 2 and "int4" in err
