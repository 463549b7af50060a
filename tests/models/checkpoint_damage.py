"""Ways to damage a checkpoint, and the sentence with which each must be refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

Damage = Callable[[Path], object]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def replace_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def header_bytes(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def with_header_length(content: bytes, length: int) -> bytes:
    return length.to_bytes(8, "little") + content[8:]


def edit_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Let `change` edit the JSON header in place; the tensors' bytes stay as they are."""

    def edit(content: bytes) -> bytes:
        end = header_bytes(content)
        header = json.loads(content[8:end])
        change(header)
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + content[end:]

    return replace_bytes(WEIGHTS, edit)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return damage


def edit_json(name: str, **changes: Any) -> Damage:
    def damage(directory: Path) -> None:
        fields = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**fields, **changes}))

    return damage


def remove_field(field: str) -> Damage:
    def damage(directory: Path) -> None:
        fields = json.loads((directory / "config.json").read_text())
        del fields[field]
        (directory / "config.json").write_text(json.dumps(fields))

    return damage


def move_range(name: str, start: int, end: int) -> Damage:
    """Shift the two data_offsets of a tensor by these numbers of bytes."""

    def change(header: dict[str, Any]) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + start, offsets[1] + end]

    return edit_header(change)


def add_row(position: int) -> Damage:
    """A tensor claims one row more, and its range as many bytes. position: in the order of the file."""

    def change(header: dict[str, Any]) -> None:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        entry = sorted(entries, key=lambda entry: entry["data_offsets"])[position]
        start, end = entry["data_offsets"]
        row_bytes = (end - start) // entry["shape"][0]
        entry["shape"][0] += 1
        entry["data_offsets"] = [start, end + row_bytes]

    return edit_header(change)


def remove_first_from_header(directory: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        del header[min(names, key=lambda name: header[name]["data_offsets"][0])]

    edit_header(change)(directory)


def set_entry(**changes: Any) -> Damage:
    return edit_header(lambda header: header[NORM].update(changes))


def put(name: str, tensor: torch.Tensor) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({name: tensor}))


def loop(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(name)

    return damage


def put_directory(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return damage


def put_pipe(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return damage


def larger_tokenizer(directory: Path) -> None:
    vocabulary = {f"word{index}": index for index in range(500)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    write_tokenizer(directory, backend)


def unigram(directory: Path) -> None:
    pieces = [(f"piece{index}", -1.0) for index in range(385)]
    write_tokenizer(directory, Tokenizer(models.Unigram(pieces, unk_id=0)))


def config(**changes: Any) -> Damage:
    return edit_json("config.json", **changes)


IN_SINGLE_FILE: dict[str, tuple[Damage, str]] = {
    # the file as a whole
    "empty weights": (replace_bytes(WEIGHTS, lambda c: b""), "model.safetensors: damaged .*has 0 bytes"),
    "cut in the length": (replace_bytes(WEIGHTS, lambda c: c[:5]), "has 5 bytes, .* takes 8"),
    "cut in the header": (replace_bytes(WEIGHTS, lambda c: c[:500]), r"ends after 492 of the \d+ bytes"),
    "cut in the data": (
        replace_bytes(WEIGHTS, lambda c: c[: len(c) * 2 // 3]),
        r"tensor model.\S+ ends at byte \d+, but the file ends at \d+",
    ),
    "last byte cut": (replace_bytes(WEIGHTS, lambda c: c[:-1]), r"ends at byte (\d+), but the file ends at"),
    "a rest": (replace_bytes(WEIGHTS, lambda c: c + bytes(24)), "24 bytes follow tensor .*, the last of its"),
    "pytorch's pickle": (replace_bytes(WEIGHTS, lambda c: b"\x80\x02}q\x00" * 99), "length of its header is"),
    "no header": (replace_bytes(WEIGHTS, lambda c: with_header_length(c, 0)), "is 0 bytes, it must be 1 to"),
    "huge header": (
        replace_bytes(WEIGHTS, lambda c: with_header_length(c, 2**64 - 1)),
        f"is {2**64 - 1} bytes, it must be 1 to 100000000",
    ),
    "header beyond the file": (
        replace_bytes(WEIGHTS, lambda c: with_header_length(c, len(c) + 1)),
        r"ends after \d+ of the \d+ bytes of its header",
    ),
    "header one short": (
        replace_bytes(WEIGHTS, lambda c: with_header_length(c, header_bytes(c) - 9)),
        "not JSON at line 1, column",
    ),
    "bit flip in the header": (
        replace_bytes(WEIGHTS, lambda c: c[:8] + bytes([c[8] ^ 4]) + c[9:]),
        "not JSON at line 1, column 1: Expecting value",
    ),
    "header of bytes": (
        replace_bytes(WEIGHTS, lambda c: c[:20] + b"\xff" + c[21:]),
        "byte 12 is not UTF-8",
    ),
    # tensors' entries
    "range larger than the shape": (
        move_range(NORM, 0, 4),
        r"tensor model.norm.weight has data_offsets for 260 bytes, but shape \[64\] of F32 takes 256",
    ),
    "overlap": (add_row(0), r"overlaps tensor .* by \d+ bytes"),
    "range beyond the file": (add_row(-1), r"ends at byte \d+, but the file ends at \d+"),
    "hole": (remove_first_from_header, r"a hole of \d+ bytes lies before tensor"),
    "ends before it starts": (
        set_entry(data_offsets=[256, 0]),
        "norm.weight has data_offsets .*start and an",
    ),
    "negative offsets": (set_entry(data_offsets=[-256, 0]), r"data_offsets \[-256, 0\], they must be"),
    "offsets beyond 64 bits": (set_entry(data_offsets=[0, 10**40]), "data_offsets .*they must be"),
    "no shape": (
        edit_header(lambda h: h[NORM].pop("shape")),
        "norm.weight has shape None, it must be a list",
    ),
    "negative shape": (set_entry(shape=[-64]), r"has shape \[-64\], it must be a list of at most 8 sizes"),
    "shape of a billion billion": (set_entry(shape=[10**9, 10**9]), "takes 4000000000000000000"),
    "shape of true": (set_entry(shape=[True]), r"shape \[True\], it must"),
    "no dtype": (set_entry(dtype=None), "has dtype None, which is no name"),
    "dtype I8": (put(NORM, torch.ones(64, dtype=torch.int8)), "dtype I8; supported are F32, BF16, F16"),
    "dtype F8": (
        put(HEAD, torch.ones(384, 64).to(torch.float8_e4m3fn)),
        "lm_head.weight has dtype F8_E4M3; supported are F32, BF16, F16",
    ),
    "name of two lines": (
        edit_header(lambda h: h.update({"a\nb": h.pop(NORM)})),
        r"tensor name 'a\\nb' must have at most 1024 printable characters",
    ),
    # the model
    "transposed": (
        put(HEAD, torch.ones(64, 384)),
        r"lm_head.weight has shape \[64, 384\], but config.json implies \[384, 64\]",
    ),
    "other vocabulary": (
        put("model.embed_tokens.weight", torch.ones(385, 64)),
        r"model.embed_tokens.weight has shape \[385, 64\], but config.json implies \[384, 64\]",
    ),
    "extra tensor": (
        put("model.layers.0.self_attn.q_norm.weight", torch.ones(8)),
        "layers.0.self_attn.q_norm.weight is not part of a LlamaForCausalLM",
    ),
    "missing tensor": (edit_tensors(lambda t: t.pop(NORM)), "tensor model.norm.weight is missing$"),
    # config.json
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file$"),
    "empty config": (replace_bytes("config.json", lambda c: b""), "config.json: the file is empty"),
    "config cut": (replace_bytes("config.json", lambda c: c[:99]), r"not valid JSON \(not JSON at line \d"),
    "config of bytes": (replace_bytes("config.json", lambda c: b"\xff" + c), "byte 0 is not UTF-8"),
    "config of brackets": (replace_bytes("config.json", lambda c: b"[" * 10**6), "nested too deeply"),
    "config is a list": (replace_bytes("config.json", lambda c: b"[1]"), "a JSON object, found list"),
    "number of many digits": (
        replace_bytes("config.json", lambda c: b'{"hidden_size": ' + b"9" * 9999 + b"}"),
        "a number of 9999 digits",
    ),
    "absent field": (remove_field("hidden_size"), "hidden_size must be an integer from 1 .*found nothing"),
    "null": (config(num_hidden_layers=None), "num_hidden_layers must be an integer .* found None"),
    "negative": (config(vocab_size=-384), "vocab_size must be an integer from 1 to .*found -384"),
    "hidden size of 10^12": (config(hidden_size=10**12), "hidden_size .*1 to 16777216, found 1000000000000"),
    "10^9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers .*1 to 1024, found 1000000000"),
    "the largest sizes": (
        config(hidden_size=2**24, intermediate_size=2**24, vocab_size=2**24),
        r"config.json implies \[",
    ),
    "heads that do not divide": (
        config(num_attention_heads=6, num_key_value_heads=2, head_dim=None),
        r"hidden_size must be a multiple of num_attention_heads \(6\), found 64",
    ),
    "KV heads that do not divide": (
        config(num_key_value_heads=3),
        r"num_key_value_heads must divide num_attention_heads \(8\), found 3",
    ),
    "string for a number": (config(hidden_size="64"), "hidden_size must be an integer .*found '64'"),
    "bool for a number": (config(num_hidden_layers=True), "num_hidden_layers must be .*found True"),
    "eps is NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps must be a finite number .*found nan"),
    "eps of 400 digits": (config(rms_norm_eps=10**400), "rms_norm_eps must be a finite number"),
    "unknown architecture": (config(architectures=["MambaForCausalLM"]), "one of .*LlamaForCausalLM.*Mamba"),
    "unknown rope": (
        config(rope_scaling={"rope_type": "spiral"}),
        "rope_scaling.rope_type must be one of default, .*found 'spiral'",
    ),
    "GPTQ": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config is not supported .*'gptq', but weights must be float32, bfloat16, float16",
    ),
    "FP8": (config(quantization_config={"quant_method": "fp8"}), "quantization_config .*'fp8'"),
    "unknown quantization": (config(quantization_config=4), "quantization_config is not supported"),
    # the other files
    "generation config cut": (
        replace_bytes("generation_config.json", lambda c: c[:20]),
        "generation_config.json: not valid JSON",
    ),
    "end beyond the vocabulary": (
        edit_json("generation_config.json", eos_token_id=[1, 384]),
        r"generation_config.json: eos_token_id .*below vocab_size \(384\)",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "tokenizer cut": (
        replace_bytes("tokenizer.json", lambda c: c[: len(c) // 2]),
        "tokenizer.json: not (valid JSON|a valid tokenizer)",
    ),
    "larger tokenizer": (
        larger_tokenizer,
        "tokenizer.json: it has token id 499, but vocab_size in config.json is 384",
    ),
    "larger Unigram tokenizer": (unigram, "it has token id 384, but vocab_size in config.json is 384"),
    # the file system
    "weights are a directory": (put_directory(WEIGHTS), "model.safetensors: not a regular file"),
    "config is a directory": (put_directory("config.json"), "config.json: not a regular file"),
    "tokenizer is a directory": (put_directory("tokenizer.json"), "tokenizer.json: "),
    "weights are a pipe": (put_pipe(WEIGHTS), "model.safetensors: not a regular file"),
    "config is a pipe": (put_pipe("config.json"), "config.json: not a regular file"),
    "weights link to themselves": (loop(WEIGHTS), "safetensors: cannot be read .Too many levels of symbolic"),
    "config links to itself": (loop("config.json"), "config.json: cannot be read .Too many levels"),
    "generation config links to itself": (
        loop("generation_config.json"),
        "generation_config.json: cannot be",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX} is there"),
    "the directory is empty": (lambda d: [p.unlink() for p in d.iterdir()], "config.json: no such file"),
}


def edit_index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def copy_tensors(directory: Path) -> None:
    first, second = shards(directory)[:2]
    save_file({**load_file(second), **load_file(first)}, second)


IN_SHARDS: dict[str, tuple[Damage, str]] = {
    "missing shard": (
        lambda d: shards(d)[1].unlink(),
        f"model-00002-of-.*safetensors: no such file, though {INDEX} names it",
    ),
    "index names an absent tensor": (
        edit_index(lambda names: names.update({"model.ghost": names[NORM]})),
        f"model-.*safetensors: tensor 'model.ghost' is missing, though {INDEX} names it",
    ),
    "index names the wrong shard": (
        edit_index(lambda names: names.update({NORM: min(names.values())})),
        "model-00001-of-.*: tensor 'model.norm.weight' is missing, though",
    ),
    "tensor in two shards": (copy_tensors, "model-00002-of-.*: tensor .* is also in another shard"),
    "shard outside the directory": (
        edit_index(lambda names: names.update({NORM: "../secret.safetensors"})),
        "weight_map names '../secret.safetensors', which is not a plain file name",
    ),
    "shard at an absolute path": (
        edit_index(lambda names: names.update({NORM: "/etc/passwd"})),
        "weight_map names '/etc/passwd', which is not a plain",
    ),
    "shard is the parent": (edit_index(lambda names: names.update({NORM: ".."})), "not a regular file"),
    "shard of two lines": (edit_index(lambda names: names.update({NORM: "a\nb"})), r"names 'a\\nb', which"),
    "shard links to itself": (lambda d: loop(shards(d)[0].name)(d), "cannot be read .Too many levels of"),
    "shard cut": (
        lambda d: replace_bytes(shards(d)[2].name, lambda c: c[:-100])(d),
        "model-00003-of-.*: damaged .*ends at byte",
    ),
    "empty index": (replace_bytes(INDEX, lambda c: b""), "index.json: the file is empty"),
    "index without a map": (replace_bytes(INDEX, lambda c: b"{}"), "weight_map must be an object"),
}
