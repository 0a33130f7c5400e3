"""Models with experts: names, folders, packs, grouped experts; choices recorded, replayed, biased and evened out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AttentionMaskInterface, AutoModel, AutoModelForImageTextToText

import sailvl
from sailvl.model import (
    SailVLForConditionalGeneration,
    SailVLModel,
    SailVLMoeForConditionalGeneration,
    balance,
    checkpoint,
    moe,
)
from sailvl.model.attention import PACKED

VIT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
LM = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def config(tiny_processor: Any) -> Any:
    return lambda **lm: checkpoint.config_for("nano-moe", processor=tiny_processor, vit=VIT, lm={**LM, **lm})


@pytest.fixture(scope="module")
def model(config: Any) -> SailVLMoeForConditionalGeneration:
    return checkpoint.build(config(), seed=0).eval()


def ids_of(length: int, seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def pack_kwargs(lengths: list[int]) -> dict[str, Any]:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    longest = max(lengths)
    return {
        "position_ids": positions,
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }


# ---- names, sizes, folders ----------------------------------------------------------------------------------------


def test_every_way_of_building_gives_the_sparse_class(config: Any, tiny_model: Any) -> None:
    chosen = config()
    assert chosen.architectures == ["SailVLMoeForConditionalGeneration"]
    for built in (
        SailVLForConditionalGeneration(chosen),
        SailVLMoeForConditionalGeneration(chosen),
        AutoModelForImageTextToText.from_config(chosen),
        checkpoint.build(chosen, seed=0),
        copy.deepcopy(checkpoint.build(chosen, seed=0)),
    ):
        assert type(built) is SailVLMoeForConditionalGeneration
    assert type(tiny_model) is SailVLForConditionalGeneration
    assert type(AutoModel.from_config(chosen)) is SailVLModel
    assert sailvl.SailVLMoeForConditionalGeneration is SailVLMoeForConditionalGeneration
    assert "Qwen3MoeDecoderLayer" in SailVLMoeForConditionalGeneration._no_split_modules
    with pytest.raises(ValueError, match="'qwen3' has no experts"):
        SailVLMoeForConditionalGeneration(tiny_model.config)


def test_router_logits_stay_off(config: Any, model: Any) -> None:
    assert config(output_router_logits=True).text_config.output_router_logits is False
    assert getattr(model.model(input_ids=ids_of(4, 0)), "router_logits", None) is None


@pytest.mark.parametrize(
    ("size", "total", "active", "lm", "lm_active"),
    [
        ("nano", 4_479_008, 4_479_008, 3_212_800, 3_212_800),
        ("nano-moe", 6_842_400, 4_483_104, 5_576_192, 3_216_896),
        ("16b-a2.5b", 16_427_082_240, 3_139_527_168, 15_728_257_024, 2_440_701_952),
        ("30b-a3b", 31_230_947_840, 4_051_857_920, 30_532_122_624, 3_353_032_704),
    ],
)
def test_parameter_counts(size: str, total: int, active: int, lm: int, lm_active: int) -> None:
    """Qwen3-30B-A3B is published with 30.5 B parameters, 3.3 B of them active."""
    with torch.device("meta"):
        built = SailVLForConditionalGeneration(checkpoint.config_for(size))
    idle = 0
    for block in moe.sparse_layers(built).values():
        experts = sum(parameter.numel() for parameter in block.experts.parameters())
        idle += experts // block.gate.num_experts * (block.gate.num_experts - block.gate.top_k)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert (count, count - idle) == (total, active)
    found = sum(parameter.numel() for _, parameter in checkpoint.part_parameters(built, "lm"))
    assert (found, found - (total - active)) == (lm, lm_active)


@pytest.mark.parametrize("tied", [True, False])
def test_folders(config: Any, tiny_processor: Any, tmp_path: Path, tied: bool) -> None:
    built = checkpoint.build(config(tie_word_embeddings=tied), seed=3)
    checkpoint.save(built, tiny_processor, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    block = "language_model.model.layers.1.mlp."
    expected = {f"{block}gate.weight"} | {
        f"{block}experts.{expert}.{part}_proj.weight" for expert in range(8) for part in ("gate", "up", "down")
    }
    assert {name for name in tensors if name.startswith(block)} == expected
    assert ("language_model.lm_head.weight" in tensors) == (not tied)
    theirs = built.model.language_model.layers[1].mlp.experts
    gate, up = theirs.gate_up_proj[5].chunk(2)
    for part, value in (("gate", gate), ("up", up), ("down", theirs.down_proj[5])):
        assert torch.equal(tensors[f"{block}experts.5.{part}_proj.weight"], value)
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["architectures"] == ["SailVLMoeForConditionalGeneration"] and saved.get("router_bias") is None
    for load in (SailVLForConditionalGeneration, AutoModel, AutoModelForImageTextToText):
        again, info = load.from_pretrained(tmp_path / "model", output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        assert type(again) is SailVLMoeForConditionalGeneration
        assert all(torch.equal(a, b) for a, b in zip(built.parameters(), again.parameters(), strict=True))


def test_a_missing_expert_is_an_error(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint.save(model, None, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["language_model.model.layers.0.mlp.gate.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(checkpoint.CheckpointError, match=r"1 missing tensors, first model.*0.mlp.gate.weight"):
        checkpoint.load(tmp_path / "model")


# ---- packs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_packed_equals_unpacked(model: Any, dtype: torch.dtype, tolerance: float, use_cache: bool | None) -> None:
    model = copy.deepcopy(model).to(dtype)
    image, per_tile = model.config.image_token_id, model.config.tokens_per_tile
    lengths, tiles = [19, 1, 6, 23], [2, 0, 0, 3]
    parts = [ids_of(length, seed) for seed, length in enumerate(lengths)]
    for ids, count in zip(parts, tiles, strict=True):
        ids[0, 1 : 1 + count * per_tile] = image
    pixels = torch.randn(sum(tiles), 3, 56, 56, generator=torch.Generator().manual_seed(9)).to(dtype)
    extra = {} if use_cache is None else {"use_cache": use_cache}
    attended: dict[str, list[torch.Tensor]] = {"packed": [], "alone": []}

    def keep(name: str) -> Any:
        first = model.model.language_model.layers[0].self_attn.o_proj
        return first.register_forward_pre_hook(lambda _, args: attended[name].append(args[0]))

    with torch.no_grad():
        handle = keep("packed")
        packed = model(torch.cat(parts, 1), pixel_values=pixels, **pack_kwargs(lengths), **extra).logits
        handle.remove()
        handle = keep("alone")
        alone = [
            model(ids, pixel_values=part, use_cache=False).logits
            for ids, part in zip(parts, pixels.split(tiles), strict=True)
        ]
        handle.remove()
    scale = max(1.0, float(packed.abs().max()))
    assert (packed - torch.cat(alone, 1)).abs().max() <= tolerance * scale
    # What reaches the first layer's attention differs by the rounding of matrix products over other numbers of rows.
    assert (attended["packed"][0] - torch.cat(attended["alone"], 1)).abs().max() <= tolerance * scale


def test_the_attention_itself_is_bitwise_equal(model: Any) -> None:
    """The same queries, keys and values, packed and document by document, as the sparse model's layer attends them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from sailvl.model.attention import packed_attention

    layer = model.model.language_model.layers[0].self_attn
    generator, lengths = torch.Generator().manual_seed(0), [7, 1, 12]
    tensors = [torch.randn(1, heads, 20, 16, generator=generator) for heads in (4, 2, 2)]
    offsets = pack_kwargs(lengths)["cu_seq_lens_q"]
    empty = torch.empty(1, 1, 0, 0)
    packed, _ = packed_attention(layer, *tensors, empty, cu_seq_lens_q=offsets, scaling=layer.scaling)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in tensors), strict=True)
    alone = [sdpa_attention_forward(layer, *part, None, scaling=layer.scaling)[0] for part in parts]
    assert torch.equal(packed, torch.cat(alone, dim=1))


def test_no_gradient_crosses_documents(model: Any) -> None:
    lengths = [7, 5, 9]
    leaks = {}
    for name, kwargs in {"packed": pack_kwargs(lengths), "plain": {}}.items():
        embeds = model.get_input_embeddings()(ids_of(21, 0)).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            model(inputs_embeds=embeds, **kwargs).logits[0, 7:12].logsumexp(-1).sum(), embeds
        )
        assert gradient[0, 7:12].abs().sum() > 0
        leaks[name] = float(gradient[0, :7].abs().sum() + gradient[0, 12:].abs().sum())
    assert leaks["packed"] == 0.0 and leaks["plain"] > 0.0


def test_a_pack_builds_no_mask_and_sliding_windows_are_refused(
    config: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("a mask was built")

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, PACKED, refuse)
    model(ids_of(12, 0), **pack_kwargs([5, 7]))
    with pytest.raises(AssertionError, match="a mask was built"):
        model(ids_of(12, 0))
    windowed = checkpoint.build(config(use_sliding_window=True, sliding_window=4), seed=0)
    with pytest.raises(ValueError, match="sliding windows"):
        windowed(ids_of(12, 0), **pack_kwargs([5, 7]))


def test_generation_in_a_left_padded_batch(model: Any) -> None:
    """With restarting positions and without: padded rows answer as they do alone."""
    rows = [ids_of(5, 1), ids_of(9, 2)]
    alone = [model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :] for ids in rows]
    batch, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for row, ids in enumerate(rows):
        batch[row, 9 - ids.shape[1] :], mask[row, 9 - ids.shape[1] :] = ids[0], 1
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 9:]
    assert len({tuple(row.tolist()) for row in together}) == 2
    for row, answer in zip(together, alone, strict=True):
        assert torch.equal(row[: len(answer)], answer)


# ---- grouped experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_grouped_experts_equal_a_loop(model: Any, dtype: torch.dtype, tokens: int) -> None:
    """Forward and both gradients; with one or three tokens most experts get no row."""
    experts = copy.deepcopy(model.model.language_model.layers[0].mlp.experts).to(dtype)
    generator = torch.Generator().manual_seed(tokens)
    inputs, direction = (torch.randn(tokens, 64, generator=generator).to(dtype) for _ in range(2))
    scores = torch.rand(tokens, 8, generator=generator)
    weights, ids = scores.topk(2)
    outcome = {}
    for name in (moe.EXPERTS, "grouped_mm", "eager"):
        experts.config._experts_implementation = name
        leaves = [inputs.clone().requires_grad_(), weights.to(dtype).requires_grad_(), *experts.parameters()]
        out = experts(leaves[0], ids, leaves[1])
        outcome[name] = (out, *torch.autograd.grad((out * direction).sum(), leaves))
    assert model.config.text_config._experts_implementation == moe.EXPERTS, "the default"
    tolerance = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 0.02}
    for ours, librarys, loop in zip(*outcome.values(), strict=True):
        assert torch.equal(ours, librarys)
        scale = max(1.0, float(loop.detach().abs().max()))
        torch.testing.assert_close(ours / scale, loop / scale, **tolerance)


def test_grouped_experts_obey_autocast(model: Any) -> None:
    experts = copy.deepcopy(model.model.language_model.layers[0].mlp.experts)
    generator = torch.Generator().manual_seed(0)
    inputs, direction = (torch.randn(50, 64, generator=generator) for _ in range(2))
    weights, ids = torch.rand(50, 8, generator=generator).topk(2)
    outcome = []
    for autocast in (True, False):
        ours = copy.deepcopy(experts) if autocast else copy.deepcopy(experts).bfloat16()
        given = inputs if autocast else inputs.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = ours(given, ids, weights.bfloat16())
        assert out.dtype == given.dtype and all(value.is_leaf for value in ours.parameters())
        outcome.append((out, *torch.autograd.grad((out.bfloat16() * direction.bfloat16()).sum(), ours.parameters())))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(*outcome, strict=True))


def test_the_loop_equals_experts_written_out(model: Any) -> None:
    block = copy.deepcopy(model.model.language_model.layers[0].mlp).double()
    block.experts.config = copy.deepcopy(block.experts.config)
    block.experts.config._experts_implementation = moe.EXPERTS
    x = torch.randn(1, 11, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros_like(x[0])
    for token, hidden in enumerate(x[0]):
        scores = (block.gate.weight @ hidden).softmax(0, dtype=torch.float)
        weights, ids = scores.topk(2)
        weights = (weights / weights.sum()).double()
        for weight, expert in zip(weights, ids, strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ hidden).chunk(2)
            expected[token] += weight * (block.experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(block(x)[0], expected, rtol=0, atol=1e-12)


def test_double_precision_falls_back_to_the_loop(model: Any) -> None:
    double = copy.deepcopy(model).double()
    assert double.config.text_config._experts_implementation == moe.EXPERTS
    ours = double(ids_of(9, 0)).logits
    double.set_experts_implementation("eager")
    assert torch.equal(double(ids_of(9, 0)).logits, ours)
    double.set_experts_implementation("grouped_mm")
    with pytest.raises((RuntimeError, ValueError)):
        double(ids_of(9, 0))


def test_another_implementation_can_be_asked_for(model: Any, tmp_path: Path) -> None:
    checkpoint.save(model, None, tmp_path / "model")
    for name in ("eager", "grouped_mm"):
        chosen = {"text_config": name}
        loaded = SailVLForConditionalGeneration.from_pretrained(tmp_path / "model", experts_implementation=chosen)
        assert loaded.config.text_config._experts_implementation == name
        torch.testing.assert_close(loaded(ids_of(9, 0)).logits, model(ids_of(9, 0)).logits, rtol=0, atol=1e-4)


# ---- recording ------------------------------------------------------------------------------------------------------


def routed(model: Any, **inputs: Any) -> list[torch.Tensor]:
    """The choices of every layer, from the routers' own logits."""
    seen: list[torch.Tensor] = []
    blocks = moe.sparse_layers(model).values()
    handles = [b.gate.register_forward_hook(lambda _, __, out: seen.append(out[0].topk(2).indices)) for b in blocks]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_recording(model: Any) -> None:
    first, second = ids_of(9, 0, rows=2), ids_of(4, 1)
    with moe.record_routing(model) as routing, torch.no_grad():
        model(first)
        model.model(input_ids=second)
    expected = [routed(model, input_ids=ids) for ids in (first, second)]
    assert routing.layers == (0, 1, 2) and [tuple(ids.shape) for ids in routing.ids] == [(3, 18, 2), (3, 4, 2)]
    for layer in range(3):
        both = torch.cat([choices[layer] for choices in expected])
        assert torch.equal(torch.cat([ids[layer] for ids in routing.ids]).long(), both)
        assert torch.equal(routing.counts[layer], torch.bincount(both.flatten(), minlength=8))
    model(first)
    assert len(routing.ids) == 2, "nothing is recorded after the context"


def test_padding_does_not_count(model: Any) -> None:
    ids = ids_of(6, 4)
    with moe.record_routing(model) as alone, torch.no_grad():
        model(ids)
    padded, mask = F.pad(ids, (5, 0)), F.pad(torch.ones_like(ids), (5, 0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with moe.record_routing(model) as routing, torch.no_grad():
        model(padded, attention_mask=mask, position_ids=positions)
    assert torch.equal(routing.counts, alone.counts) and routing.counts.sum() == 3 * 6 * 2
    assert routing.ids[0].shape == (3, 11, 2), "choices keep every token, for replay"
    with moe.record_routing(model) as cached:
        model.generate(padded, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert cached.counts.sum() == 3 * (6 + 2) * 2, "the last token is never forwarded"
    with pytest.raises(ValueError, match="which tokens are padding"), moe.record_routing(model):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # the name that 5.18 knows
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_counts_once(model: Any, reentrant: bool) -> None:
    trained, ids = copy.deepcopy(model).train(), ids_of(8, 0)
    with moe.record_routing(trained) as plain:
        trained(ids, **pack_kwargs([3, 5])).logits.sum().backward()
    trained.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    trained.model.language_model.layers[0].mlp.gate.register_forward_hook(lambda *_: runs.append(1))
    embeds = trained.get_input_embeddings()(ids).detach().requires_grad_()
    with moe.record_routing(trained) as routing:
        trained(inputs_embeds=embeds, **pack_kwargs([3, 5])).logits.sum().backward()
    assert len(runs) == 2, "the router did run again"
    assert torch.equal(routing.counts, plain.counts) and len(routing.ids) == 1


def test_a_dense_model_has_nothing_to_record(tiny_model: Any) -> None:
    for context in (moe.record_routing(tiny_model), moe.replay_routing(tiny_model, [])):
        with pytest.raises(ValueError, match="'qwen3' has no experts"), context:
            pass


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_replaying_the_own_record_changes_nothing(config: Any, norm: bool) -> None:
    model = checkpoint.build(config(norm_topk_prob=norm), seed=1)
    ids, kwargs = ids_of(12, 3), pack_kwargs([5, 7])
    with moe.record_routing(model) as routing:
        plain = model(ids, **kwargs).logits
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((plain * direction).sum(), list(model.model.language_model.parameters()))
    with moe.replay_routing(model, routing.ids), moe.record_routing(model) as again:
        replayed = model(ids, **kwargs).logits
    assert torch.equal(replayed, plain) and torch.equal(again.ids[0], routing.ids[0])
    others = torch.autograd.grad((replayed * direction).sum(), list(model.model.language_model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_replaying_other_choices(model: Any) -> None:
    ids = ids_of(10, 3)
    with moe.record_routing(model) as routing, torch.no_grad():
        plain = model(ids).logits
    other = (routing.ids[0] + 1) % 8
    with moe.record_routing(model) as seen, moe.replay_routing(model, [other]):
        replayed = model(ids).logits
    assert torch.equal(seen.ids[0], other) and (replayed - plain).abs().max() > 1e-3
    routers = [block.gate.weight for block in moe.sparse_layers(model).values()]
    for gradient in torch.autograd.grad(replayed.square().mean(), routers):
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    live = other.clone()
    live[:, 4:] = -1  # not recorded: routed as usual, which in the first layer is what it was
    with moe.record_routing(model) as seen, moe.replay_routing(model, [live]), torch.no_grad():
        model(ids)
    assert torch.equal(seen.ids[0][:, :4], other[:, :4])
    assert torch.equal(seen.ids[0][0, 4:], routing.ids[0][0, 4:])
    assert torch.equal(model(ids).logits.detach(), plain), "nothing is left behind"


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_replay_under_checkpointing_and_over_several_passes(model: Any) -> None:
    """Recomputation replays the pass it belongs to, not the next one."""
    trained = copy.deepcopy(model).train()
    passes = [ids_of(7, seed) for seed in range(2)]
    recorded = [(torch.randint(0, 4, (3, 7, 1)) * 2 + torch.tensor([0, 1])) for _ in passes]
    gradients: dict[bool, list[torch.Tensor]] = {}
    for recompute in (False, True):
        if recompute:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        trained.zero_grad(set_to_none=True)
        with moe.replay_routing(trained, recorded):
            for ids in passes:
                trained(ids, use_cache=False).logits.square().mean().backward()
        gradients[recompute] = [value.grad for value in trained.model.language_model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ([], "0 forward passes were recorded, and this is one more"),
        ([torch.zeros(3, 4, 2)], r"\(3, 4, 2\), this pass needs \(3, 5, 2\)"),
        ([torch.full((3, 5, 2), 8)], "name expert 8 of 8"),
    ],
)
def test_records_that_do_not_fit(model: Any, recorded: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message), moe.replay_routing(model, recorded):
        model(ids_of(5, 0))


# ---- bias ----------------------------------------------------------------------------------------------------------


def test_a_zero_bias_is_no_bias(model: Any) -> None:
    plain, biased, ids = copy.deepcopy(model), copy.deepcopy(model), ids_of(40, 5)
    moe.set_bias(biased, torch.zeros(3, 8))
    outcomes = []
    for one in (plain, biased):
        with moe.record_routing(one) as routing:
            logits = one(ids).logits
        outcomes.append(
            (
                logits,
                routing.ids[0],
                *torch.autograd.grad(logits.square().mean(), list(one.parameters())[-40:], allow_unused=True),
            )
        )
    for a, b in zip(*outcomes, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_bias_chooses_and_does_not_weigh(model: Any) -> None:
    biased = copy.deepcopy(model)
    bias = torch.zeros(3, 8)
    bias[:, 2], bias[:, 6] = 4.0, 3.0
    moe.set_bias(biased, bias)
    gate = biased.model.language_model.layers[0].mlp.gate
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    _, weights, ids = gate(hidden)
    assert ids.tolist() == [[2, 6]] * 5
    scores = (hidden @ gate.weight.T).softmax(-1)[:, [2, 6]]
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
    moe.set_bias(biased, None)
    assert biased.config.router_bias is None
    assert torch.equal(biased(ids_of(9, 0)).logits, model(ids_of(9, 0)).logits)


@pytest.mark.parametrize("shape", [(2, 8), (3, 7)])
def test_a_bias_that_does_not_fit(model: Any, tiny_model: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="router_bias holds"):
        moe.set_bias(copy.deepcopy(model), torch.zeros(shape))
    with pytest.raises(ValueError, match="router_bias holds"):
        moe.set_bias(copy.deepcopy(tiny_model), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_saved_and_loaded(model: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    biased = copy.deepcopy(model)
    bias = (torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) / 4).bfloat16().float()
    moe.set_bias(biased, bias)
    checkpoint.save(biased, None, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    checkpoint.save(model, None, tmp_path / "plain")
    assert tensors.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys(), "weights do not show it"
    biased, ids = checkpoint.load(tmp_path / "plain", dtype=dtype), ids_of(20, 1)
    moe.set_bias(biased, bias)
    for load in (checkpoint.load, AutoModel.from_pretrained):
        again = load(tmp_path / "model", dtype=dtype, attn_implementation=PACKED)
        with moe.record_routing(again) as ours, moe.record_routing(biased) as theirs, torch.no_grad():
            assert torch.equal(again(ids).logits, biased(ids).logits)
        assert torch.equal(ours.ids[0], theirs.ids[0])
    with torch.device("meta"):
        empty = AutoModel.from_config(again.config)
    assert getattr(empty.language_model.layers[0].mlp.gate, moe.BIAS).is_meta
    rebuilt = AutoModel.from_config(again.config).to(torch.bfloat16)
    assert torch.equal(getattr(rebuilt.language_model.layers[1].mlp.gate, moe.BIAS).float(), bias[1])


# ---- balance ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16).filter(any))
def test_entropy(counts: list[int]) -> None:
    given_counts = torch.tensor([counts])
    value = float(balance.entropy(given_counts))
    assert -1e-12 <= value <= 1 + 1e-12
    p = torch.distributions.Categorical(probs=torch.tensor(counts, dtype=torch.float64)).entropy()
    assert value == pytest.approx(float(p) / torch.tensor(float(len(counts))).double().log().item(), abs=1e-6)
    assert balance.expert_load(given_counts).sum() == pytest.approx(1.0)
    assert float(balance.entropy(given_counts * 7)) == pytest.approx(value)


def test_entropy_at_its_ends() -> None:
    assert balance.entropy(torch.tensor([[5, 5, 5, 5], [0, 9, 0, 0]])).tolist() == pytest.approx([1.0, 0.0])
    assert balance.entropy(torch.tensor([3])).item() == 1.0


@pytest.fixture
def skewed(model: Any) -> SailVLMoeForConditionalGeneration:
    """Routers that prefer two experts, so that there is something to even out."""
    uneven = copy.deepcopy(model)
    with torch.no_grad():
        for block in moe.sparse_layers(uneven).values():
            block.gate.weight[:6] *= 0.2
    return uneven


def sets(model: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    text = [{"input_ids": ids_of(40, seed)} for seed in range(3)]
    multimodal = []
    for seed in range(3):
        ids = ids_of(40, 100 + seed)
        ids[0, 2:26] = model.config.image_token_id
        pixels = torch.randn(6, 3, 56, 56, generator=torch.Generator().manual_seed(seed))
        multimodal.append({"input_ids": ids, "pixel_values": pixels})
    return text, multimodal


def test_the_report(skewed: Any) -> None:
    text, multimodal = sets(skewed)
    report = balance.entropy_report(skewed, text, multimodal)
    with moe.record_routing(skewed) as routing, torch.no_grad():
        for inputs in text:
            skewed(**inputs)
    assert [row.layer for row in report] == [0, 1, 2]
    assert [row.text for row in report] == balance.entropy(routing.counts).tolist()
    assert [row.text_unused for row in report] == (routing.counts == 0).sum(-1).tolist()
    assert all(0 < row.multimodal < 1 for row in report)
    with pytest.raises(ValueError, match="no tokens"):
        balance.entropy_report(skewed, [], multimodal)


@pytest.mark.parametrize("max_kl", [1e9, 0.05])
def test_calibration_raises_the_entropy_within_the_guard(skewed: Any, max_kl: float) -> None:
    text, multimodal = sets(skewed)
    weights = [parameter.clone() for parameter in skewed.parameters()]
    text_before = balance.measure(skewed, text)
    found = balance.calibrate(skewed, text, multimodal, rounds=12, max_kl=max_kl)
    before, after = (sum(row.multimodal for row in rows) / 3 for rows in (found.before, found.after))
    assert after > before + (0.03 if max_kl > 1 else 0.001)
    assert found.after == balance.entropy_report(skewed, text, multimodal), "the report is of the model as it is left"
    p, q = (balance.expert_load(counts + 1) for counts in (text_before, balance.measure(skewed, text)))
    assert (p * (p / q).log()).sum(-1).tolist() == pytest.approx(list(found.text_kl), abs=1e-9)
    assert max(found.text_kl) <= max_kl and found.bias.abs().max() > 0
    assert torch.equal(torch.tensor(skewed.config.router_bias), found.bias)
    assert torch.equal(found.bias.bfloat16().float(), found.bias)
    assert all(torch.equal(a, b) for a, b in zip(weights, skewed.parameters(), strict=True))


def test_no_room_for_a_move_leaves_the_model_as_it_was(skewed: Any) -> None:
    text, multimodal = sets(skewed)
    plain = skewed(**multimodal[0]).logits
    found = balance.calibrate(skewed, text, multimodal, rounds=3, max_kl=-1.0)
    assert not found.bias.any() and found.before == found.after
    assert torch.equal(skewed(**multimodal[0]).logits, plain)


def test_parts_and_names_cover_the_experts(model: Any) -> None:
    names = {name for name, _ in checkpoint.part_parameters(model, "lm")}
    assert "model.language_model.layers.0.mlp.gate.weight" in names
    assert "model.language_model.layers.2.mlp.experts.gate_up_proj" in names
    parts = [name for part in checkpoint.PARTS for name, _ in checkpoint.part_parameters(model, part)]
    assert sorted(parts) == sorted(name for name, _ in model.named_parameters())
    assert isinstance(model.model.language_model.layers[0].mlp.gate, nn.Module)
