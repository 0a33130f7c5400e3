import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from sailvl.model import checkpoint
from sailvl.train.soup import SoupError, greedy_soup, homology, soup


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


# ---- greedy -----------------------------------------------------------------------------------------------------


def numbers(tmp_path, *values):
    return [folder(tmp_path / f"m{i}", {"w": torch.tensor([float(v)])}) for i, v in enumerate(values)]


def value_of(path):
    return load_file(path / "model.safetensors")["w"].item()


def nearest(target, asked=None):
    def score(path):
        if asked is not None:
            asked.append(value_of(path))
        return -abs(value_of(path) - target)

    return score


def test_greedy_adds_in_order_of_score_what_does_not_make_it_worse(tmp_path):
    asked = []
    paths = numbers(tmp_path, 9.0, 1.0, 6.0, 2.0)
    found = greedy_soup(paths, tmp_path / "soup", nearest(4.0, asked))
    assert asked[:4] == [9.0, 1.0, 6.0, 2.0], "every model alone"
    # best first: 6 and 2 (equal, in the order given), 1, 9; (6 + 2) / 2 = 4 is kept, then neither 3 nor 17 / 3
    assert asked[4:] == [4.0, 3.0, pytest.approx(17 / 3)]
    assert found.kept == (paths[2], paths[3]) and found.score == 0.0
    assert [path for path, _ in found.scores] == [paths[2], paths[3], paths[1], paths[0]]
    assert value_of(tmp_path / "soup") == 4.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2", "m3", "soup"]


def test_greedy_is_never_worse_than_the_best_and_keeps_equals(tmp_path):
    paths = numbers(tmp_path, 4.0, 100.0)
    assert greedy_soup(paths, tmp_path / "soup", nearest(4.0)).kept == (paths[0],) and value_of(tmp_path / "soup") == 4
    same = greedy_soup(paths, tmp_path / "all", lambda path: 0.0)
    assert same.kept == tuple(paths) and value_of(tmp_path / "all") == 52.0
    assert greedy_soup(paths[:1], tmp_path / "one", nearest(0.0)).kept == (paths[0],)


def test_greedy_needs_models_and_numbers(tmp_path):
    with pytest.raises(SoupError, match="at least one"):
        greedy_soup([], tmp_path / "soup", nearest(0.0))
    paths = numbers(tmp_path, 1.0, 2.0)
    with pytest.raises(SoupError, match="m0 is not a number"):
        greedy_soup(paths, tmp_path / "soup", lambda path: float("nan"))

    def stopped(path):
        if path.name.startswith("."):
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        greedy_soup(paths, tmp_path / "soup", stopped)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1"]


# ---- homology ---------------------------------------------------------------------------------------------------


def drawn(seed, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return {"a": scale * torch.randn(200, 300, generator=draw), "b": scale * torch.randn(500, generator=draw)}


def plus(*parts):
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def test_distances_and_cosines_are_those_of_the_whole_vectors(tmp_path):
    base, one, two = drawn(0), drawn(1, 0.1), drawn(2, 0.2)
    shared = drawn(3, 0.1)
    models = [plus(base, one, shared), plus(base, two, shared), base]
    paths = [folder(tmp_path / str(i), {**m, "ids": torch.arange(3)}) for i, m in enumerate(models)]
    origin = folder(tmp_path / "base", {**base, "ids": torch.arange(3)})
    found = homology(paths, origin)
    flat = [torch.cat([(m[n].double() - base[n].double()).flatten() for n in ("a", "b")]) for m in models]
    whole = torch.cat([base[n].double().flatten() for n in ("a", "b")])
    assert found.distances == pytest.approx([float(v.norm() / whole.norm()) for v in flat], rel=1e-12)
    cosine = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    assert found.cosines[0][1] == found.cosines[1][0] == pytest.approx(cosine, rel=1e-9)
    assert found.cosines[0][0] == pytest.approx(1.0) and found.cosines[2][0] != found.cosines[2][0]
    assert found.faults() == [], "branches that share a direction, and the base itself"


def test_a_stranger_is_warned_of_before_it_is_averaged(tmp_path):
    base, shared = drawn(0), drawn(3, 0.05)
    origin = folder(tmp_path / "base", base)
    paths = [folder(tmp_path / str(i), plus(base, shared, drawn(10 + i, 0.05))) for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soup(paths, tmp_path / "kin", base=origin)
    stranger = folder(tmp_path / "stranger", drawn(99))
    with pytest.warns(UserWarning, match=r"stranger is 1\.4\d times the length of .*base away"):
        soup([*paths, stranger], tmp_path / "mixed", base=origin)


def test_unrelated_and_opposed_directions_are_warned_of(tmp_path):
    base, way = drawn(0), drawn(1, 0.05)
    against = {name: -value for name, value in way.items()}
    origin = folder(tmp_path / "base", base)
    paths = [folder(tmp_path / str(i), plus(base, m)) for i, m in enumerate((way, against, drawn(7, 0.05)))]
    faults = homology(paths, origin).faults()
    assert len(faults) == 3 and "cosine -1.000" in faults[0] and all("may be worse than either" in f for f in faults)


def test_a_base_of_another_shape_is_refused(tmp_path):
    paths = [folder(tmp_path / "a", drawn(0))]
    with pytest.raises(SoupError, match="hold different tensors"):
        homology(paths, folder(tmp_path / "base", {"a": drawn(0)["a"]}))
