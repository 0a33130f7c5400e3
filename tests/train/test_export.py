import itertools
import json
import resource
import weakref

import pytest
import torch
from safetensors.torch import load_file

from sailvl import dist
from sailvl.model import checkpoint as model_checkpoint
from sailvl.model.checkpoint import CheckpointError, build
from sailvl.train import checkpoint, export

DENSE_LM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}  # fmt: skip
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def untied(config):
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = False
    return config


@pytest.fixture
def made(processor, tiny_config):
    """Makes a model: tied or not, sparse, or in bf16."""

    def one(kind):
        if kind == "sparse":
            lm = {**DENSE_LM, "num_experts": 4, "moe_intermediate_size": 16}
            return build(model_checkpoint.config_for("nano-moe", processor=processor, vit=VIT, lm=lm), seed=1)
        fresh = build(untied(tiny_config()) if kind == "untied" else tiny_config(), seed=1)
        return fresh.bfloat16() if kind == "bf16" else fresh

    return one


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("kind", "size"),
    [*itertools.product(["tied", "untied", "bf16"], ["5GB", 60_000, 1]), ("sparse", "5GB")],
)
def test_byte_for_byte_what_saving_in_one_piece_writes(made, processor, tmp_path, kind, size):
    model = made(kind)
    model_checkpoint.save(model, processor, tmp_path / "saved", max_shard_size=size)
    checkpoint.export(model, processor, tmp_path / "exported", max_shard_size=size)
    saved, exported = contents(tmp_path / "saved"), contents(tmp_path / "exported")
    assert exported.keys() == saved.keys() and ("model.safetensors.index.json" in saved) == (size != "5GB")
    assert [name for name in saved if saved[name] != exported[name]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "saved"]


def test_files_of_a_sparse_model_keep_to_the_limit(made, processor, tmp_path):
    model = made("sparse")
    checkpoint.export(model, processor, tmp_path / "model", max_shard_size=60_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    whole = model_checkpoint.load(tmp_path / "model").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 60_000
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(file).values()
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 30)[None]).logits


@pytest.mark.parametrize("kind", ["tied", "untied", "sparse"])
def test_a_model_loaded_from_it_answers_the_same(made, processor, tmp_path, kind):
    model = made(kind).eval()
    checkpoint.export(model, processor, tmp_path / "model", max_shard_size=60_000)
    again = model_checkpoint.load(tmp_path / "model").eval()
    assert again.dtype == model.dtype and torch.equal(logits(again), logits(model))


def spread(states, model, processor, out, size, bf16):
    if bf16:
        for name, parameter in model.named_parameters():
            if "vision_tower" in name:
                parameter.data = parameter.data.bfloat16().float()
    if dist.world_size() > 1:
        if bf16:  # frozen weights that every process keeps whole, in less
            model.model.vision_tower.bfloat16()
            for block in model.model.language_model.layers:
                torch.distributed.fsdp.fully_shard(block)
        else:
            states.shard(model)
    checkpoint.export(model, processor, out, max_shard_size=size)


@pytest.mark.parametrize(("kind", "bf16"), [("tied", False), ("sparse", False), ("tied", True)])
def test_from_shards_it_is_what_one_process_writes(group, states, made, processor, tmp_path, kind, bf16):
    spread(states, made(kind), processor, tmp_path / "one", 60_000, bf16)
    group.together(2, spread, states, made(kind), processor, tmp_path / "two", 60_000, bf16)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_one_whole_tensor_is_in_memory_at_a_time(made, processor, tmp_path, monkeypatch):
    alive = []

    def watched(tensor):
        assert all(seen() is None for seen in alive)
        copy = tensor.detach().clone()
        alive.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(export, "whole", watched)
    checkpoint.export(made("sparse"), processor, tmp_path / "model")
    assert len(alive) > 20


def without_room(states, model, processor, out):
    states.shard(model)
    if dist.is_main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        checkpoint.export(model, processor, out)
    except CheckpointError as error:
        return str(error)
    return None


def test_on_a_full_disk_all_processes_say_so_and_the_earlier_folder_stays(group, states, made, processor, tmp_path):
    model = made("tied")
    checkpoint.export(model, processor, tmp_path / "model")
    before = contents(tmp_path / "model")
    for message in group.together(2, without_room, states, model, processor, tmp_path / "model"):
        assert "saving failed" in message and "earlier folder is intact" in message
    assert contents(tmp_path / "model") == before and len(list(tmp_path.iterdir())) == 1


def test_adapters_are_not_exported_as_weights(made, processor, tmp_path):
    pytest.importorskip("peft")
    from sailvl.model import lora

    model = made("tied")
    lora.attach(model, ("lm",), rank=2, alpha=2, seed=0)
    with pytest.raises(CheckpointError, match="adapters beside its weights"):
        checkpoint.export(model, processor, tmp_path / "model")
