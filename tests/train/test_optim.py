import pytest

from sailvl.train import optim


def groups(model, stage):
    optim.freeze(model, stage.trains)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    built = optim.build(model, stage).param_groups
    return built, {names[id(p)]: group for group in built for p in group["params"]}


def test_every_trained_parameter_once_and_no_frozen_one(model, stage):
    built, by_name = groups(model, stage(trains=("vit", "lm")))
    expected = [name for name, _ in model.named_parameters() if "multi_modal_projector" not in name]
    assert sorted(by_name) == sorted(expected)
    assert sum(len(group["params"]) for group in built) == len(expected)
    assert all(p.requires_grad == (name in by_name) for name, p in model.named_parameters())


def test_decay_on_matrices_and_the_embedding_not_on_norms_biases_positions(model, stage):
    _, by_name = groups(model, stage(trains=("vit", "projector", "lm"), weight_decay=0.3))
    for name, decays in {
        "model.language_model.embed_tokens.weight": True,
        "model.language_model.layers.0.self_attn.q_proj.weight": True,
        "model.vision_tower.preprocessor.patchifier.proj.weight": True,
        "model.multi_modal_projector.linear_1.weight": True,
        "model.multi_modal_projector.linear_1.bias": False,
        "model.multi_modal_projector.layer_norm.weight": False,
        "model.language_model.norm.weight": False,
        "model.vision_tower.preprocessor.pos_embed": False,
    }.items():
        assert by_name[name]["weight_decay"] == (0.3 if decays else 0.0), name


def test_the_encoder_has_its_own_scale(model, stage):
    optim.freeze(model, ("vit", "lm"))
    optimizer = optim.build(model, stage(trains=("vit", "lm"), vit_lr_scale=0.1))
    optim.set_lr(optimizer, 2.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.2, 2.0]


def test_unknown_or_no_parts_are_refused(model):
    with pytest.raises(ValueError, match="not \\['head'\\]"):
        optim.freeze(model, ("lm", "head"))
    with pytest.raises(ValueError, match="nothing"):
        optim.freeze(model, ())
