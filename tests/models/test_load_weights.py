"""Weights: sharded and single files, dtypes, progress, and checkpoints that do not fit their config."""

import json
import random
import shutil

import pytest
import torch
from checkpoints import FAMILIES, write_checkpoint
from safetensors.torch import load_file, save_file

from pdengine.models.checkpoint import CheckpointError
from pdengine.models.config import load_config
from pdengine.models.weights import load_decoder

CPU = torch.device("cpu")


def load(directory, dtype=torch.float32, progress=None):
    return load_decoder(directory, load_config(directory), dtype=dtype, device=CPU, progress=progress)


@pytest.fixture
def checkpoint(tmp_path, checkpoint_of):
    """A copy that a test may damage."""
    return shutil.copytree(checkpoint_of("qwen2"), tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path):
    write_checkpoint("qwen3-biases", tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def rewrite(directory, change):
    """Let `change` edit the dict of tensors of a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_is_single(family, tmp_path, checkpoint_of):
    write_checkpoint(family, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    sharded, single = load(tmp_path).state_dict(), load(checkpoint_of(family)).state_dict()
    assert sharded.keys() == single.keys()
    for name, tensor in single.items():
        assert torch.equal(sharded[name], tensor), name


def test_every_tensor_of_the_checkpoint_is_in_the_decoder(checkpoint):
    """Counted in bits: the sorted values of the file and of the decoder are the same."""
    stored = torch.cat([tensor.flatten() for tensor in load_file(checkpoint / "model.safetensors").values()])
    loaded = torch.cat([tensor.flatten() for tensor in load(checkpoint).state_dict().values()])
    assert torch.equal(stored.sort().values, loaded.sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_of_dtype(dtype, checkpoint):
    exact, converted = load(checkpoint).state_dict(), load(checkpoint, dtype).state_dict()
    for name, tensor in converted.items():
        assert tensor.dtype == (torch.float32 if "norm" in name else dtype), name
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name


def test_progress_counts_every_byte(sharded):
    calls = []
    load(sharded, torch.bfloat16, lambda done, total: calls.append((done, total)))
    stored = sum(
        tensor.nbytes for path in sharded.glob("*.safetensors") for tensor in load_file(path).values()
    )
    done = [done for done, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (stored, stored)
    assert {total for _, total in calls} == {stored}


def test_harmless_extras(checkpoint_of, tmp_path):
    directory = shutil.copytree(checkpoint_of("qwen2-tied"), tmp_path / "checkpoint")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(directory, add)
    expected, actual = load(checkpoint_of("qwen2-tied")).state_dict(), load(directory).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove("lm_head.weight"), "tensor lm_head.weight is missing$"),
        (remove("model.layers.2.self_attn.k_proj.bias"), "layers.2.self_attn.k_proj.bias is missing$"),
        (
            put("model.layers.3.mlp.up_proj.weight", torch.ones(2)),
            "layers.3.mlp.up_proj.weight is not part of",
        ),
        (put("model.layers.0.mlp.up_proj.bias", torch.ones(96)), "layers.0.mlp.up_proj.bias is not part of"),
        (put("model.norm.weight", torch.ones(95)), r"model.norm.weight has shape \[95\].*\[96\]"),
        (put("model.norm.weight", torch.tensor(1.0)), r"model.norm.weight has shape \[\]"),
        (put("lm_head.weight", torch.ones(96, 384)), r"lm_head.weight has shape \[96, 384\].*\[384, 96\]"),
        (put("model.norm.weight", torch.ones(96, dtype=torch.int8)), "model.norm.weight has dtype I8.*BF16"),
    ],
)
def test_tensors_that_do_not_fit(checkpoint, change, sentence):
    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=sentence) as raised:
        load(checkpoint)
    assert str(checkpoint) in str(raised.value)


def test_a_config_with_more_layers(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config.update(num_hidden_layers=4, layer_types=None)
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.3\..* is missing \(and \d+ others\)"):
        load(checkpoint)


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(checkpoint)


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such file"):
        load(sharded)


def test_a_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({**load_file(second), **tensors}, second)
    with pytest.raises(CheckpointError, match=f"{second.name}: tensor .* is also in another shard"):
        load(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", 3, None, ["a"]])
def test_an_index_that_points_elsewhere(sharded, name):
    index_path = sharded / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map"):
        load(sharded)


@pytest.mark.parametrize("content", [b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b"nonsense"])
def test_a_broken_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(sharded)


def test_truncated_files(checkpoint):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
            load(checkpoint)


def test_bit_flips_in_the_header_never_escape_as_something_else(checkpoint):
    """Only a CheckpointError may come out; few flips are legal, such as one in the metadata's text."""
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(0)
    sentences = []
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(header_bytes)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load(checkpoint)
        except CheckpointError as error:
            sentences.append(str(error))
    assert len(sentences) > 250
    assert all(str(checkpoint) in sentence for sentence in sentences)
