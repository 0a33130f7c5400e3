"""The any-resolution encoder: equal to the fixed one where it must be, and pictures that never see each other."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from sailvl.geometry import AnyRes
from sailvl.model import SailViT, SailViTConfig, SailVLForConditionalGeneration, SailVLProcessor, checkpoint
from sailvl.model.attention import PACKED, packed_attention
from sailvl.model.positions import stretched, turn, turns
from sailvl.model.processing import build_processor
from sailvl.model.projector import pixel_shuffle, pixel_shuffle_ragged
from tests.tiny import loud

WIDTHS = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def encoder(implementation: str = PACKED, **changes: object) -> SailViT:
    """Random weights, so large that places and neighbours matter."""
    fields = {**WIDTHS, "image_size": 56, "any_resolution": True, "initializer_range": 0.1, **changes}
    torch.manual_seed(0)
    return SailViT._from_config(SailViTConfig(**fields), attn_implementation=implementation).eval()


def patches(grids: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(r * c for r, c in grids), 3, 14, 14, generator=generator)


def cut(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles [N, 3, S, S] as patches [N * P, 3, 14, 14], row by row."""
    side = tiles.shape[-1] // 14
    return tiles.view(-1, 3, side, 14, side, 14).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 14, 14)


# ---- equal to the fixed encoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("select_layer", [-1, -2, 0, 1])
def test_without_rotary_a_tile_is_seen_as_by_the_fixed_encoder(select_layer: int) -> None:
    fixed = encoder(any_resolution=False)
    anyres = encoder(rope_2d=False)
    anyres.load_state_dict(fixed.state_dict())
    tiles = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        expected = fixed(tiles, select_layer).last_hidden_state.flatten(0, 1)
        actual = anyres(cut(tiles), select_layer, image_grid_hw=torch.tensor([[4, 4]] * 3)).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_model_of_tiles_turns_into_one_of_any_resolution(tiny_model, tiny_processor, tiny_tokenizer_file) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    processor = build_processor(tiny_tokenizer_file, tiling=AnyRes(side=56, max_side=224))
    inputs = processor(images=image, text="<image>what?", return_tensors="pt")
    with torch.no_grad():
        expected = tiny_model(**tiny_processor(images=image, text="<image>what?", return_tensors="pt")).logits
        same = checkpoint.anyres_from_fixed(tiny_model, rope_2d=False)
        turned = checkpoint.anyres_from_fixed(tiny_model)
        torch.testing.assert_close(same(**inputs).logits, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(turned(**inputs).logits, expected, atol=1e-5), "turned heads are other features"
    assert not tiny_model.config.vision_config.any_resolution, "the original stays as it is"
    assert turned.config.vision_config.any_resolution and turned.config.vision_config.rope_2d
    old, new = tiny_model.state_dict(), turned.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    pointers = {weight.data_ptr() for weight in tiny_model.parameters()}
    assert not pointers & {weight.data_ptr() for weight in turned.parameters()}, "a copy"
    half = checkpoint.anyres_from_fixed(copy.deepcopy(tiny_model).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and not half.training


# ---- positions --------------------------------------------------------------------------------------------------


def test_the_table_is_itself_at_its_own_grid_and_bicubic_elsewhere() -> None:
    vit = encoder(rope_2d=False)
    table = vit.preprocessor.pos_embed
    with torch.no_grad():
        table.normal_()
        assert torch.equal(stretched(table, [(4, 4)]), table)
        grids = [(2, 6), (4, 4), (10, 2), (2, 6)]
        actual = stretched(table, grids)[0].split([12, 16, 20, 12])
        assert torch.equal(actual[0], actual[3]) and torch.equal(actual[1], table[0])
        for (rows, columns), part in zip(grids, actual, strict=True):
            expected = separable(table[0].view(4, 4, -1).double().numpy(), rows, columns)
            np.testing.assert_allclose(part.numpy(), expected.reshape(rows * columns, -1), rtol=0, atol=1e-5)
        half = stretched(table.bfloat16(), [(2, 6)])
        assert half.dtype == torch.bfloat16
        wide = nn.functional.interpolate(
            table.bfloat16().float().view(1, 4, 4, -1).permute(0, 3, 1, 2), size=(2, 6), mode="bicubic"
        )
        assert torch.equal(half[0], wide.flatten(2)[0].t().bfloat16()), "computed in fp32, then rounded"


def separable(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bicubic interpolation from its definition: Keys' kernel with a = -0.75, half-pixel centres, clamped edges."""

    def weights(size: int, length: int) -> np.ndarray:
        matrix = np.zeros((size, length))
        for index in range(size):
            place = (index + 0.5) * length / size - 0.5
            first = math.floor(place)
            for tap in range(first - 1, first + 3):
                x = abs(place - tap)
                inner = (1.25 * x - 2.25) * x * x + 1
                outer = -0.75 * (((x - 5) * x + 8) * x - 4)
                matrix[index, min(max(tap, 0), length - 1)] += inner if x <= 1 else outer
        return matrix

    return np.einsum("ri,cj,ijd->rcd", weights(rows, len(table)), weights(columns, table.shape[1]), table)


def test_rotary_angles_by_hand() -> None:
    config = SailViTConfig(**WIDTHS, image_size=56, any_resolution=True, rope_theta=100.0)
    turned = turns(config, [(1, 2), (3, 2)], torch.zeros(1))
    assert turned is not None and turned.shape == (2, 8, 1, 12), "K is 24: six pairs a row, six a column"
    for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]):
        angles = [row * 100 ** (-i / 6) for i in range(6)] + [column * 100 ** (-i / 6) for i in range(6)]
        torch.testing.assert_close(turned[0, place, 0], torch.tensor(angles).cos())
        torch.testing.assert_close(turned[1, place, 0], torch.tensor(angles).sin())
    heads = torch.randn(1, 8, 2, 24)
    pairs = torch.complex(heads[..., :12], heads[..., 12:]) * torch.complex(turned[0], turned[1])
    torch.testing.assert_close(turn(heads, turned), torch.cat([pairs.real, pairs.imag], -1))
    assert turn(heads.bfloat16(), turned).dtype == torch.bfloat16


def test_rotary_scores_depend_on_offsets_alone() -> None:
    """The score of two patches is the same wherever in the picture they lie: what makes it hold at any size."""
    config = SailViTConfig(**WIDTHS, image_size=56, any_resolution=True)
    turned = turns(config, [(6, 7)], torch.zeros(1, dtype=torch.float64))
    query, key = torch.randn(2, 24, dtype=torch.float64)
    queries = turn(query.expand(1, 42, 1, 24), turned)[0, :, 0].view(6, 7, 24)
    keys = turn(key.expand(1, 42, 1, 24), turned)[0, :, 0].view(6, 7, 24)
    for rows, columns in ((0, 0), (1, 0), (0, 1), (2, 3)):
        scores = (queries[: 6 - rows, : 7 - columns] * keys[rows:, columns:]).sum(-1)
        torch.testing.assert_close(scores, scores[0, 0].expand_as(scores))
    by_row, by_column = queries[1, 0] @ keys[0, 0], queries[0, 1] @ keys[0, 0]
    assert not torch.isclose(by_row, by_column)


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)])
def test_both_parts_can_be_switched(parts: tuple[bool, bool]) -> None:
    """With any of them two places differ; without the table a picture moved on the grid stays itself."""
    rope, interpolate = parts
    vit = encoder(rope_2d=rope, interpolate_positions=interpolate)
    with torch.no_grad():
        vit.preprocessor.pos_embed.normal_()
        upright = vit(patches([(2, 6)]), image_grid_hw=[[2, 6]]).last_hidden_state
        lying = vit(patches([(2, 6)]), image_grid_hw=[[6, 2]]).last_hidden_state
        assert not torch.allclose(upright, lying, atol=1e-3), "the same patches in another shape are another picture"
        vit.preprocessor.pos_embed.zero_()
        changed = not torch.allclose(upright, vit(patches([(2, 6)]), image_grid_hw=[[2, 6]]).last_hidden_state)
    assert changed == interpolate


def test_impossible_encoders_are_refused() -> None:
    with pytest.raises(ValueError, match="needs rope_2d or interpolate_positions"):
        encoder(rope_2d=False, interpolate_positions=False)
    with pytest.raises(ValueError, match="heads of a multiple of 4 features, got 36 / 2"):
        encoder(hidden_size=36)


# ---- pictures of different sizes in one call --------------------------------------------------------------------

GRIDS = [(2, 2), (6, 4), (2, 14), (4, 4), (1, 1)]


@pytest.mark.parametrize("implementation", [PACKED, "sdpa", "eager"])
def test_packed_pictures_equal_single_ones(implementation: str) -> None:
    vit, pixels = encoder(implementation), patches(GRIDS)
    lengths = [rows * columns for rows, columns in GRIDS]
    with torch.no_grad():
        packed = vit(pixels, image_grid_hw=torch.tensor(GRIDS)).last_hidden_state
        alone = [
            vit(part, image_grid_hw=torch.tensor([grid])).last_hidden_state
            for part, grid in zip(pixels.split(lengths), GRIDS, strict=True)
        ]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
        changed = pixels.clone()
        changed[lengths[0] : lengths[0] + lengths[1]] += 1
        other = vit(changed, image_grid_hw=torch.tensor(GRIDS)).last_hidden_state
    same = [torch.equal(a, b) for a, b in zip(packed.split(lengths), other.split(lengths), strict=True)]
    assert same == [True, False, True, True, True], "no picture sees another"


def test_attention_of_packed_pictures_is_bitwise_that_of_each() -> None:
    module = encoder().trunk.blocks[0].attn
    query, key, value = torch.randn(3, 1, 2, 53, 24)
    lengths = [4, 24, 20, 4, 1]
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    packed, _ = packed_attention(module, query, key, value, None, cu_seq_lens_q=offsets, is_causal=False)
    parts = zip(*(heads.split(lengths, 2) for heads in (query, key, value)), strict=True)
    alone = [packed_attention(module, *heads, None, is_causal=False)[0] for heads in parts]
    assert torch.equal(packed, torch.cat(alone, 1))
    scores = (query[0, :, 4:28] @ key[0, :, 4:28].transpose(1, 2) * 24**-0.5).softmax(-1) @ value[0, :, 4:28]
    torch.testing.assert_close(packed[0, 4:28], scores.transpose(0, 1)), "and not causal"


def test_gradients_of_packed_pictures_are_those_of_each() -> None:
    gradients = []
    for calls in ([GRIDS], [[grid] for grid in GRIDS]):
        vit = encoder().double()
        pixels = patches(GRIDS).double()
        start = 0
        for grids in calls:
            count = sum(r * c for r, c in grids)
            part = pixels[start : start + count]
            vit(part, image_grid_hw=torch.tensor(grids)).last_hidden_state.square().sum().backward()
            start += count
        gradients.append({name: weight.grad for name, weight in vit.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9)
        assert gradient.any(), name


def test_no_picture_still_has_a_zero_gradient() -> None:
    vit = encoder()
    out = vit(torch.zeros(0, 3, 14, 14), image_grid_hw=torch.zeros(0, 2, dtype=torch.int64)).last_hidden_state
    assert out.shape == (0, 48)
    out.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in vit.parameters())


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        vit = encoder().train()
        if checkpointing:
            vit.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        vit(patches(GRIDS), image_grid_hw=torch.tensor(GRIDS)).last_hidden_state.square().sum().backward()
        gradients.append(vit.preprocessor.pos_embed.grad)
    assert gradients[0].any() and torch.equal(*gradients)


def test_wrong_pixels_are_refused() -> None:
    vit, fixed = encoder(), encoder(any_resolution=False)
    for pixels, options, message in (
        (patches([(2, 2)]), {}, "needs image_grid_hw beside pixel_values"),
        (patches([(2, 2)]), {"image_grid_hw": [[2, 2], [2, 4]]}, r"hold 12 patches, pixel_values has 4"),
        (patches([(2, 2)]), {"image_grid_hw": [[-2, -2]]}, r"hold 4 patches, pixel_values has 4"),
        (torch.zeros(16, 3, 56, 56), {"image_grid_hw": [[4, 4]]}, r"must be \[tiles, 3, 14, 14\], got \[16, 3, 56"),
    ):
        with pytest.raises(ValueError, match=message):
            vit(pixels, **options)
    with pytest.raises(ValueError, match="this one sees tiles"):
        fixed(torch.zeros(1, 3, 56, 56), image_grid_hw=[[4, 4]])


def test_1792_pixels_at_nano_widths() -> None:
    """16,384 patches: attention's memory is linear, so the call is slow on a CPU and not large."""
    vit = encoder(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=112)
    with torch.no_grad():
        out = vit(torch.zeros(128 * 128, 3, 14, 14), image_grid_hw=[[128, 128]]).last_hidden_state
    assert pixel_shuffle_ragged(out, [(128, 128)], 2).shape == (4096, 64)


# ---- pixel shuffle ----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(cells=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=4), merge=st.sampled_from([1, 2, 3]))
def test_ragged_pixel_shuffle_is_the_square_of_patches(cells: list[tuple[int, int]], merge: int) -> None:
    grids = [(rows * merge, columns * merge) for rows, columns in cells]
    features = torch.arange(sum(r * c for r, c in grids) * 2.0).view(-1, 2)
    expected, start = [], 0
    for rows, columns in grids:
        picture = features[start : start + rows * columns].view(rows, columns, 2)
        start += rows * columns
        expected += [
            picture[row : row + merge, column : column + merge].reshape(-1)
            for row in range(0, rows, merge)
            for column in range(0, columns, merge)
        ]
    actual = pixel_shuffle_ragged(features, grids, merge)
    assert actual.shape == (len(expected), 2 * merge**2)
    assert torch.equal(actual, torch.stack(expected) if expected else actual)


def test_ragged_pixel_shuffle_of_squares_is_the_fixed_one() -> None:
    features = torch.randn(3, 16, 5)
    assert torch.equal(
        pixel_shuffle_ragged(features.flatten(0, 1), [(4, 4)] * 3, 2), pixel_shuffle(features, 2).flatten(0, 1)
    )
    with pytest.raises(ValueError, match="3 x 4 patches does not divide into 2 x 2"):
        pixel_shuffle_ragged(torch.zeros(12, 5), [(3, 4)], 2)


# ---- the whole model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def any_processor(tiny_tokenizer_file) -> SailVLProcessor:
    return build_processor(tiny_tokenizer_file, tiling=AnyRes(side=56, max_side=224))


@pytest.fixture(scope="module")
def models(
    tiny_model, tiny_processor, any_processor
) -> dict[str, tuple[SailVLForConditionalGeneration, SailVLProcessor]]:
    fixed = loud(tiny_model)
    return {"tiles": (fixed, tiny_processor), "any": (checkpoint.anyres_from_fixed(fixed), any_processor)}


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


STILL, FRAME = {"type": "image"}, {"type": "image", "frame": True}
# (parts of the user's message, pictures): in front, between and behind, several turns' worth of text, a clip, none.
ROWS: list[tuple[list[object], list[Image.Image]]] = [
    ([STILL, "what is it?"], [picture(120, 50, 1)]),
    (["how many circles are in the picture?"], []),
    (["is ", STILL, "like ", STILL, "?"], [picture(40, 40, 2), picture(30, 190, 3)]),
    ([FRAME, FRAME, FRAME, "what moves?"], [picture(90, 60, 4), picture(90, 60, 5), picture(90, 60, 6)]),
    ([STILL, FRAME, "red", STILL], [picture(1, 1, 7), picture(300, 20, 8), picture(56, 56, 9)]),
]


def batch_of(processor: SailVLProcessor, rows: list[tuple[list[object], list[Image.Image]]]) -> dict[str, torch.Tensor]:
    messages = [
        [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]
        for parts, _ in rows
    ]
    return processor(
        images=[image for _, images in rows for image in images] or None,
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in messages],
        frames=[p is FRAME for parts, _ in rows for p in parts if not isinstance(p, str)],
        return_tensors="pt",
        padding=True,
    )


def answers(
    model: SailVLForConditionalGeneration, inputs: dict[str, torch.Tensor], **options: object
) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **{"do_sample": False, **options})
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["tiles", "any"])
def test_a_mixed_batch_equals_single_prompts(models, kind: str) -> None:
    model, processor = models[kind]
    inputs = batch_of(processor, ROWS)
    assert ("image_grid_hw" in inputs) == (kind == "any")
    with torch.no_grad():
        together = model(**inputs).logits
        for row, logits in zip(ROWS, together, strict=True):
            single = batch_of(processor, [row])
            alone = model(**single).logits[0]
            torch.testing.assert_close(logits[-len(alone) :], alone, rtol=0, atol=1e-5)
    # Pictures in another order are another question: the test above can fail.
    parts, images = ROWS[3]
    with torch.no_grad():
        other = model(**batch_of(processor, [(parts, images[::-1])])).logits[0, -1]
    assert not torch.allclose(other, together[3, -1], atol=1e-3)


@pytest.mark.parametrize("kind", ["tiles", "any"])
def test_a_mixed_pack_equals_single_prompts(models, kind: str) -> None:
    """The rows end to end as documents of one sequence, as training packs them."""
    model, processor = models[kind]
    singles = [batch_of(processor, [row]) for row in ROWS]
    lengths = [single["input_ids"].shape[1] for single in singles]
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    pixels = {
        name: torch.cat([single[name] for single in singles if name in single])
        for name in ("pixel_values", "image_grid_hw")
        if name in singles[0]
    }
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat([single["input_ids"] for single in singles], 1),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            **pixels,
        ).logits[0]
        for single, logits in zip(singles, packed.split(lengths), strict=True):
            torch.testing.assert_close(logits, model(**single).logits[0], rtol=0, atol=1e-5)


def test_several_answers_per_prompt(models, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = models["any"]
    expected = [answers(model, batch_of(processor, [row]))[0] for row in ROWS]
    assert len({tuple(answer) for answer in expected}) > 2
    inputs = batch_of(processor, ROWS)
    assert answers(model, inputs) == expected
    assert answers(model, inputs, use_cache=False) == expected
    encoded: list[int] = []
    forward = SailViT.forward
    monkeypatch.setattr(
        SailViT, "forward", lambda self, pixels, *a, **k: encoded.append(len(pixels)) or forward(self, pixels, *a, **k)
    )
    sampled = answers(model, inputs, num_return_sequences=3, do_sample=True, top_k=1)
    assert sampled == [answer for answer in expected for _ in range(3)]
    assert encoded == [len(inputs["pixel_values"])], "every picture is encoded once"
    beams = answers(model, inputs, num_return_sequences=2, num_beams=2)
    assert len(beams) == 2 * len(ROWS)


def test_features_made_beforehand(models) -> None:
    model, processor = models["any"]
    inputs = batch_of(processor, ROWS)
    expected = answers(model, inputs)
    pixels, grids = inputs.pop("pixel_values"), inputs.pop("image_grid_hw")
    with torch.no_grad():
        features = model.get_image_features(pixels, image_grid_hw=grids).pooler_output
    assert features.shape == (int(grids.prod(1).sum()) // 4, 64)
    assert answers(model, {**inputs, "image_features": features}) == expected
    twice = answers(model, {**inputs, "image_features": features}, num_return_sequences=2, do_sample=True, top_k=1)
    assert twice == [answer for answer in expected for _ in range(2)]
    # Servers give the grid in their own form and part the tokens by picture.
    served = torch.cat([torch.ones(len(grids), 1, dtype=torch.int64), grids], 1)
    parts = model.get_image_features(pixels, image_grid_thw=served).pooler_output
    assert [len(part) for part in parts] == (grids.prod(1) // 4).tolist()
    torch.testing.assert_close(torch.cat(list(parts)), features)


def test_mismatches_name_the_counts(models) -> None:
    model, processor = models["any"]
    inputs = batch_of(processor, ROWS)
    grids = inputs["image_grid_hw"]
    last = int(grids[-1].prod())
    fewer = {**inputs, "pixel_values": inputs["pixel_values"][:-last], "image_grid_hw": grids[:-1]}
    tokens = int(grids.prod(1).sum()) // 4
    with pytest.raises(
        ValueError, match=f"{tokens} image placeholders in input_ids, but {tokens - last // 4} image tok"
    ):
        model(**fewer)
    with pytest.raises(ValueError, match=rf"image placeholders, but {tokens - last // 4} image tokens were given"):
        answers(model, fewer, num_return_sequences=2, num_beams=2)
    with pytest.raises(ValueError, match="needs image_grid_hw"):
        model(**{name: value for name, value in inputs.items() if name != "image_grid_hw"})


@pytest.mark.parametrize("interpolate", [True, False])
def test_saved_and_loaded(models, interpolate: bool, tmp_path) -> None:
    fixed, _ = models["tiles"]
    _, processor = models["any"]
    model = checkpoint.anyres_from_fixed(fixed, interpolate_positions=interpolate)
    checkpoint.save(model, processor, tmp_path / "m")
    inputs = batch_of(AutoProcessor.from_pretrained(tmp_path / "m"), ROWS)
    with torch.no_grad():
        expected = model(**inputs).logits
        for loaded in (checkpoint.load(tmp_path / "m"), AutoModel.from_pretrained(tmp_path / "m")):
            assert loaded.config.vision_config.interpolate_positions == interpolate
            torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-5)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", attn_implementation="sdpa")
    torch.testing.assert_close(plain(**inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", ["nano", "2b"])
def test_sizes(size: str, tiny_tokenizer_file) -> None:
    fixed, anyres = checkpoint.config_for(size), checkpoint.config_for(f"{size}-anyres")
    assert anyres.vision_config.any_resolution and not fixed.vision_config.any_resolution
    differing = {
        name
        for name in anyres.vision_config.to_dict()
        if anyres.vision_config.to_dict()[name] != fixed.vision_config.to_dict()[name]
    }
    assert differing == {"any_resolution"} and anyres.text_config.to_dict() == fixed.text_config.to_dict()
    side = anyres.vision_config.image_size
    scheme = checkpoint.scheme_for(f"{size}-anyres")
    assert scheme == AnyRes(side=side, max_side=4 * side)
    assert checkpoint.scheme_for(f"{size}-anyres", side=56, max_tiles=3) == AnyRes(side=56, max_side=224, max_tiles=3)
    processor = build_processor(tiny_tokenizer_file, tiling=scheme)
    assert checkpoint.config_for(f"{size}-anyres", processor=processor).vision_config.image_size == side
    with pytest.raises(ValueError, match=f"size '{size}' sees tiles, and the processor makes pixels for AnyRes"):
        checkpoint.config_for(size, processor=processor)
    tiled = build_processor(tiny_tokenizer_file, tiling=checkpoint.scheme_for(size))
    with pytest.raises(ValueError, match=f"size '{size}-anyres' sees any resolution, .* for Tiling"):
        checkpoint.config_for(f"{size}-anyres", processor=tiled)
    with torch.device("meta"):
        model = SailVLForConditionalGeneration(anyres)
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in SailVLForConditionalGeneration(fixed).named_parameters()
        }
