import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from sailvl.model import checkpoint
from sailvl.train.soup import SoupError, soup


def folder(path, tensors, **files):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)
    return path


def tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 3, generator=generator).to(dtype),
        "b.scale": torch.randn((), generator=generator).to(dtype),
        "c.ids": torch.arange(4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [1, 7])
def test_the_soup_of_one_model_and_of_equals_is_that_model_byte_for_byte(tmp_path, dtype, count):
    values = tensors(dtype=dtype)
    values["negative.zero"] = torch.tensor([-0.0, 0.0], dtype=dtype)
    source = folder(tmp_path / "a", values, config='{"x": 1}')
    out = soup([source] * count, tmp_path / "soup")
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (out / "config.json").read_text() == '{"x": 1}'


def test_the_average(tmp_path):
    models = [tensors(seed) for seed in range(3)]
    paths = [folder(tmp_path / str(seed), model) for seed, model in enumerate(models)]
    made = load_file(soup(paths, tmp_path / "soup") / "model.safetensors")
    for name in ("a.weight", "b.scale"):
        exact = torch.stack([model[name].double() for model in models]).mean(0)
        assert torch.equal(made[name], exact.float())
    assert torch.equal(made["c.ids"], torch.arange(4))


def test_bf16_is_summed_wider_than_it_is_stored(tmp_path):
    """256 and four ones: adding the ones to 256 in bf16, whose spacing there is 2, would lose every one of them."""
    paths = [
        folder(tmp_path / str(i), {"w": torch.tensor([value], dtype=torch.bfloat16)})
        for i, value in enumerate([256.0, 1.0, 1.0, 1.0, 1.0])
    ]
    assert load_file(soup(paths, tmp_path / "soup") / "model.safetensors")["w"].item() == 52.0


def test_models_cut_into_files_differently(tmp_path):
    one, two = tensors(0), tensors(1)
    whole = folder(tmp_path / "whole", two)
    cut = tmp_path / "cut"
    cut.mkdir()
    save_file({"a.weight": one["a.weight"]}, cut / "model-00001-of-00002.safetensors")
    save_file({name: one[name] for name in ("b.scale", "c.ids")}, cut / "model-00002-of-00002.safetensors")
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    out = soup([cut, whole], tmp_path / "soup")
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in cut.iterdir())
    made = load_file(out / "model-00001-of-00002.safetensors")["a.weight"]
    torch.testing.assert_close(made, (one["a.weight"] + two["a.weight"]) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "extra": torch.zeros(1)}, r"second 1 \(extra\)"),
        (lambda t: {name: t[name] for name in ("b.scale", "c.ids")}, r"first has 1 \(a\.weight\)"),
        (
            lambda t: {**t, "a.weight": torch.zeros(5, 4)},
            r"a\.weight is F32 \[5, 3\] in .*one but F32 \[5, 4\]",
        ),
        (lambda t: {**t, "a.weight": t["a.weight"].half()}, r"a\.weight is F32 .* but F16"),
        (lambda t: {**t, "c.ids": torch.arange(1, 5)}, r"c\.ids holds integers that differ"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name_and_leave_nothing(tmp_path, change, message):
    paths = [folder(tmp_path / "one", tensors()), folder(tmp_path / "two", change(tensors(1)))]
    with pytest.raises(SoupError, match=message):
        soup(paths, tmp_path / "soup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_nothing_to_average(tmp_path):
    with pytest.raises(SoupError, match="at least one"):
        soup([], tmp_path / "soup")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SoupError, match="empty holds no"):
        soup([tmp_path / "empty"], tmp_path / "soup")


def test_an_earlier_result_is_replaced_as_a_whole(tmp_path):
    source = folder(tmp_path / "a", tensors(), config="{}")
    out = folder(tmp_path / "soup", tensors(5), leftover="{}")
    soup([source], out)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "soup"]


def test_a_real_model_loads_from_its_soup_and_is_the_average(tmp_path, assets, model, processor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    checkpoint.save(model, processor, tmp_path / "other")
    out = soup([assets / "model", tmp_path / "other"], tmp_path / "soup")
    mixed = AutoModelForImageTextToText.from_pretrained(out)
    torch.testing.assert_close(mixed.lm_head.weight, model.lm_head.weight - 0.25)
    assert AutoProcessor.from_pretrained(out).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
