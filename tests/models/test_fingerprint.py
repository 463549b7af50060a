"""Fingerprints: what must change them, what must not."""

import json
import shutil

import pytest
import torch
from checkpoints import VOCAB_SIZE
from safetensors.torch import load_file, save_file

from pdengine.models.checkpoint import CheckpointError
from pdengine.models.fingerprint import model_fingerprint, weights_fingerprint


@pytest.fixture
def checkpoint(tmp_path, checkpoint_of):
    return shutil.copytree(checkpoint_of("llama-gqa"), tmp_path / "checkpoint")


def test_copies_agree(checkpoint, checkpoint_of):
    original = checkpoint_of("llama-gqa")
    assert model_fingerprint(checkpoint) == model_fingerprint(original)
    assert weights_fingerprint(checkpoint) == weights_fingerprint(original)
    for digest in (model_fingerprint(checkpoint), weights_fingerprint(checkpoint)):
        assert len(bytes.fromhex(digest)) == 16


def test_the_spelling_of_the_config_does_not_matter_but_its_meaning_does(checkpoint):
    path = checkpoint / "config.json"
    before = model_fingerprint(checkpoint)
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["dtype"] = config.pop("torch_dtype")
    path.write_text(json.dumps(config, indent=7))
    assert model_fingerprint(checkpoint) == before
    config["rope_parameters"]["rope_theta"] += 1
    path.write_text(json.dumps(config))
    assert model_fingerprint(checkpoint) != before


def test_the_tokenizer_counts_to_the_byte(checkpoint):
    before = model_fingerprint(checkpoint)
    with (checkpoint / "tokenizer.json").open("ab") as file:
        file.write(b"\n")
    assert model_fingerprint(checkpoint) != before
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        model_fingerprint(checkpoint)


def test_an_added_token_without_an_embedding_is_no_damage(checkpoint):
    """Fine-tuned checkpoints have them; requests that use one are refused one by one."""
    before = model_fingerprint(checkpoint)
    path = checkpoint / "tokenizer.json"
    fields = json.loads(path.read_text())
    beyond = {**fields["added_tokens"][0], "id": VOCAB_SIZE, "content": "<|beyond|>"}
    path.write_text(json.dumps({**fields, "added_tokens": [*fields["added_tokens"], beyond]}))
    assert model_fingerprint(checkpoint) != before


def test_a_change_in_any_tensor_shows(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    seen = {weights_fingerprint(checkpoint)}
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1}, path, metadata={"format": "pt"})
        seen.add(weights_fingerprint(checkpoint))
    assert len(seen) == len(tensors) + 1


def test_names_of_files_and_shapes_count(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    index = {"weight_map": {"lm_head.weight": "a.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"lm_head.weight": torch.ones(8, 4)}, path)
    single = weights_fingerprint(checkpoint)
    path.rename(checkpoint / "a.safetensors")
    assert weights_fingerprint(checkpoint) != single
    save_file({"lm_head.weight": torch.ones(4, 8)}, path)
    assert weights_fingerprint(checkpoint) != single


@pytest.mark.parametrize("length", [0, 5, 8, 100])
def test_damaged_weights(checkpoint, length):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        weights_fingerprint(checkpoint)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": [1]}}',
        b'{"a": {"data_offsets": [8, 4]}}',
        b'{"a": {"data_offsets": ["0", "4"]}}',
    ],
)
def test_headers_that_are_something_else(checkpoint, header):
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        weights_fingerprint(checkpoint)
