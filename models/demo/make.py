"""Constructs the demo checkpoint: a small Llama whose weights are written down, not trained.

    python -m pdengine.models.demo.make [DIRECTORY]

The model reads facts ("The locker of Amber holds a red violin.") and answers a question about one of them
("What does the locker of Amber hold? Answer:") with the words of the fact (" a red violin"). The article
comes out of the prefill; colour and object are looked up during decode, in the KV cache of the prompt. Every
word needs the keys and values of both layers and both KV heads: out of an incomplete cache the model does not
answer.

It is an ordinary `LlamaForCausalLM` with grouped-query attention. This is how it works.

**Residual stream.** It is the direct sum of these subspaces. The embedding of a token fills the first five,
layer 1 the next two, layer 2 the last one:

    constant       one component, the same number C for every token
    kind           one flag each for: name, place, article, colour, object, begin of the text
    own name       code of the token, if it is a name
    own place      code of the token, if it is a place
    own word       code of the token, if it can be part of an answer: article, colour, object
    latest name    own name, copied from the latest name up to this token
    latest place   own place, copied from the latest place up to this token
    next word      own word, copied from the token that continues the answer

Flags are 0 or 1. Codes are unit vectors: a place has an axis of its own; names and words have random signs,
redrawn until the scalar product of any two is at most 0.4 (names) or 0.35 (words). All other tokens are
alike.

**Norms.** C = 8 outweighs the rest: the squared norm of the stream x is from 64 to 69. RMSNorm with all
weights equal to C / sqrt(hidden size) returns C x / |x|, which is x but for a factor from 0.96 to 1. The MLPs
are zero.

**Rotary embedding** (Su et al., "RoFormer", 2021). Query and key are complex vectors of one number for each
pair of components (j, j + head_dim / 2). The score of a key k that stands d tokens before the query q is

    Re sum_j  q_j conj(k_j) exp(i t_j d) / sqrt(head_dim),    t_j = theta^(-2 j / head_dim).

**Layer 1: the latest name and the latest place.** KV head 0 looks for names, KV head 1 for places. The key is
the flag of the kind, in the real part of every pair: the keys of other tokens are zero, and so are their
scores. The query is the constant, times a weight w_j for each pair. So a name d tokens ago scores sum_j w_j
cos(t_j d), with

    w_j  ~  a t_j / (a^2 + t_j^2).

As the t_j are a geometric sequence, this is a Riemann sum, on the logarithmic scale, of the integral

    integral_0^infinity  a cos(t d) / (a^2 + t^2) dt  =  (pi / 2) exp(-a d).

So a score decays with the age of the name, and the latest name wins. With a = 0.02 and weights that sum to
256, it leads an earlier name by 20 or more, if the two are eight tokens apart and it is at most 24 tokens
ago.

**Layer 2: the word in the fact.** The pairs with j >= head_dim / 4 turn by less than 0.21 radians within the
context of 2 048 tokens. Their components can compare contents at any distance:

    score  =  64 <latest name, latest name>  +  32 <latest place, latest place>  +  32 <wanted kind, kind>.

The wanted kind is a linear function of the token's own kind: after an article a colour, after a colour an
object, after an object nothing, and after any other token an article. The right word scores 128. Any other
word scores at least 32 less: another person's fact costs 64 (1 - 0.4) = 38, another place 32, another kind
32. The token that begins the text scores 110 with every query: if no word fits in all three, attention goes
there, and copies nothing.

**Grouped queries.** The two query heads of a KV head ask the same, and each brings one half of the code in
its values. In layer 2 both KV heads find the same word, with one half of its code in each; so a query head
brings a quarter.

**Output.** The logit of a word is L = 128 times the product of its code and "next word". The logit of the
end-of-text token is always 0.85 L. Other words reach 0.35 L at most, all other tokens zero. So a word comes
only if all of its code has arrived; the text ends after an object, after a question that no fact answers, or
if a part of the KV cache is missing.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from tokenizers import Tokenizer

from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.demo.tokenizer import BEGIN, CHAT_TEMPLATE, END, build_tokenizer, token_id, word_id
from pdengine.models.demo.words import ARTICLES, COLOURS, NAMES, OBJECTS, PLACES

Matrix = npt.NDArray[np.float32]
Components = npt.NDArray[np.int64]

CONTEXT = 2048
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 32
NUM_HEADS = 4
NUM_KV_HEADS = 2
GROUP = NUM_HEADS // NUM_KV_HEADS
HEAD_DIM = 128
ROPE_THETA = 1e8

# The subspaces of the residual stream, as components of it. The last component stays zero.
CONSTANT, IS_NAME, IS_PLACE, IS_ARTICLE, IS_COLOUR, IS_OBJECT, IS_BEGIN = range(7)
OWN_NAME, OWN_PLACE, OWN_WORD, LATEST_NAME, LATEST_PLACE, NEXT_WORD, _ = np.split(
    np.arange(7, HIDDEN_SIZE), np.cumsum([48, len(PLACES), 64, 48, len(PLACES), 64])
)

CONSTANT_SIZE = 8.0  # C above
MAX_NAME_OVERLAP = 0.4
MAX_WORD_OVERLAP = 0.35
FORGETTING = 0.02  # a above, per token
RECENCY_SCORE = 256.0
NAME_SCORE = 64.0
PLACE_SCORE = 32.0
KIND_SCORE = 32.0
BEGIN_SCORE = 110.0
WORD_LOGIT = 128.0  # L above
END_LOGIT = 0.85 * WORD_LOGIT


def write_checkpoint(directory: Path) -> None:
    """Writes the checkpoint in the layout of Hugging Face; equal bytes on every run.

    Raises:
        OSError: if the directory cannot be created or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    begin_id, end_id = token_id(tokenizer, BEGIN), token_id(tokenizer, END)
    weights = save(build_weights(tokenizer), metadata={"format": "pt"})
    (directory / "model.safetensors").write_bytes(weights)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "config.json", model_config(tokenizer.get_vocab_size(), begin_id, end_id))
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": begin_id, "eos_token_id": end_id, "do_sample": False},
    )
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": END,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_config(vocab_size: int, begin_id: int, end_id: int) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": begin_id,
        "eos_token_id": end_id,
    }


def build_weights(tokenizer: Tokenizer) -> dict[str, Matrix]:
    """All tensors of the checkpoint, by their Hugging Face names; matrices are [outputs, inputs]."""
    answer_words = (*ARTICLES, *COLOURS, *OBJECTS)
    word_codes = sign_codes(answer_words, len(OWN_WORD), MAX_WORD_OVERLAP)
    norm = np.full(HIDDEN_SIZE, CONSTANT_SIZE / math.sqrt(HIDDEN_SIZE), np.float32)
    tensors = {
        "model.embed_tokens.weight": embedding(tokenizer, word_codes),
        "model.norm.weight": norm,
        "lm_head.weight": output_matrix(tokenizer, word_codes),
    }
    for layer, attention in enumerate((latest_owner_attention(), fact_attention())):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.self_attn.{name}.weight": matrix for name, matrix in attention.items()}
        tensors |= {
            f"{prefix}.input_layernorm.weight": norm,
            f"{prefix}.post_attention_layernorm.weight": norm,
            f"{prefix}.mlp.gate_proj.weight": zeros(INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"{prefix}.mlp.up_proj.weight": zeros(INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"{prefix}.mlp.down_proj.weight": zeros(HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }
    return tensors


def embedding(tokenizer: Tokenizer, word_codes: dict[str, Matrix]) -> Matrix:
    """[vocab_size, hidden size]: the constant, and for words with a meaning their kind and their code."""
    name_codes = sign_codes(NAMES, len(OWN_NAME), MAX_NAME_OVERLAP)
    place_codes = dict(zip(PLACES, np.eye(len(PLACES), dtype=np.float32), strict=True))
    table = zeros(tokenizer.get_vocab_size(), HIDDEN_SIZE)
    table[:, CONSTANT] = CONSTANT_SIZE
    table[token_id(tokenizer, BEGIN), IS_BEGIN] = 1
    for words, kind, codes, own_code in (
        (NAMES, IS_NAME, name_codes, OWN_NAME),
        (PLACES, IS_PLACE, place_codes, OWN_PLACE),
        (ARTICLES, IS_ARTICLE, word_codes, OWN_WORD),
        (COLOURS, IS_COLOUR, word_codes, OWN_WORD),
        (OBJECTS, IS_OBJECT, word_codes, OWN_WORD),
    ):
        for word in words:
            row = table[word_id(tokenizer, word)]
            row[kind] = 1
            row[own_code] = codes[word]
    return table


def latest_owner_attention() -> dict[str, Matrix]:
    """Layer 1: copies the latest name and the latest place to every token."""
    pairs = np.arange(HEAD_DIM // 2)
    query, key = zeros(HEAD_DIM, HIDDEN_SIZE), zeros(NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE)
    query[pairs, CONSTANT] = RECENCY_SCORE * recency_weights() / CONSTANT_SIZE
    key[0, pairs, IS_NAME] = 1
    key[1, pairs, IS_PLACE] = 1
    sources = (*np.array_split(OWN_NAME, GROUP), *np.array_split(OWN_PLACE, GROUP))
    targets = (*np.array_split(LATEST_NAME, GROUP), *np.array_split(LATEST_PLACE, GROUP))
    return attention_weights(query, key, sources, targets)


def recency_weights() -> Matrix:
    """[head_dim / 2]: how much each rotary pair adds to the score of the latest name; they sum to 1."""
    turns = [ROPE_THETA ** (-2 * pair / HEAD_DIM) for pair in range(HEAD_DIM // 2)]  # radians per token
    weights = [FORGETTING * turn / (FORGETTING**2 + turn**2) for turn in turns]
    return np.array([weight / sum(weights) for weight in weights], np.float32)


def fact_attention() -> dict[str, Matrix]:
    """Layer 2: copies the word of the wanted kind from the fact about the latest name and place."""
    steady = np.concatenate([np.arange(HEAD_DIM // 4, HEAD_DIM // 2), np.arange(3 * HEAD_DIM // 4, HEAD_DIM)])
    name, place, (article, colour, item, begin) = np.split(
        steady, np.cumsum([len(LATEST_NAME), len(LATEST_PLACE)])
    )
    query, key = zeros(HEAD_DIM, HIDDEN_SIZE), zeros(HEAD_DIM, HIDDEN_SIZE)
    query[name, LATEST_NAME] = NAME_SCORE
    query[place, LATEST_PLACE] = PLACE_SCORE
    query[article, CONSTANT] = KIND_SCORE / CONSTANT_SIZE
    query[article, [IS_ARTICLE, IS_COLOUR, IS_OBJECT]] = -KIND_SCORE
    query[colour, IS_ARTICLE] = KIND_SCORE
    query[item, IS_COLOUR] = KIND_SCORE
    query[begin, CONSTANT] = BEGIN_SCORE / CONSTANT_SIZE

    key[name, LATEST_NAME] = 1
    key[place, LATEST_PLACE] = 1
    key[[article, colour, item, begin], [IS_ARTICLE, IS_COLOUR, IS_OBJECT, IS_BEGIN]] = 1
    sources, targets = np.array_split(OWN_WORD, NUM_HEADS), np.array_split(NEXT_WORD, NUM_HEADS)
    return attention_weights(query, np.stack([key] * NUM_KV_HEADS), sources, targets)


def attention_weights(
    query: Matrix, key: Matrix, sources: Sequence[Components], targets: Sequence[Components]
) -> dict[str, Matrix]:
    """The four projections of an attention layer.

    Args:
        query: [head_dim, hidden size], the same for all query heads; query times key is the score itself.
        key: [kv_heads, head_dim, hidden size].
        sources: per query head, the components of the residual stream that it copies.
        targets: per query head, the components that it copies them to.
    """
    value, output = zeros(NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE), zeros(HIDDEN_SIZE, NUM_HEADS, HEAD_DIM)
    for head, (source, target) in enumerate(zip(sources, targets, strict=True)):
        kv_head, place_in_group = divmod(head, GROUP)
        carriers = place_in_group * (HEAD_DIM // GROUP) + np.arange(len(source))
        value[kv_head, carriers, source] = 1
        output[target, head, carriers] = 1
    return {
        "q_proj": np.tile(query * np.float32(math.sqrt(HEAD_DIM)), (NUM_HEADS, 1)),
        "k_proj": key.reshape(-1, HIDDEN_SIZE),
        "v_proj": value.reshape(-1, HIDDEN_SIZE),
        "o_proj": output.reshape(HIDDEN_SIZE, -1),
    }


def output_matrix(tokenizer: Tokenizer, word_codes: dict[str, Matrix]) -> Matrix:
    """[vocab_size, hidden size]: reads the next word; without one, the text ends."""
    rows = zeros(tokenizer.get_vocab_size(), HIDDEN_SIZE)
    for word, code in word_codes.items():
        rows[word_id(tokenizer, word), NEXT_WORD] = WORD_LOGIT * code
    rows[token_id(tokenizer, END), CONSTANT] = END_LOGIT / CONSTANT_SIZE
    return rows


def sign_codes(words: Iterable[str], dim: int, max_overlap: float) -> dict[str, Matrix]:
    """A unit vector of `dim` random signs for each word; no scalar product of two exceeds `max_overlap`.

    The signs are a hash of the word and of the number of the trial, so they are the same on every machine.
    """
    codes = zeros(0, dim)
    for word in words:
        for trial in range(10_000):
            digest = hashlib.shake_256(f"{word} {trial}".encode()).digest(dim // 8)
            bits = np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32)
            code = (2 * bits - 1) / np.float32(math.sqrt(dim))
            if np.all(np.abs(codes @ code) <= max_overlap):
                break
        else:
            raise AssertionError(f"{dim} dimensions are too few for so many codes")
        codes = np.vstack([codes, code])
    return dict(zip(words, codes, strict=True))


def zeros(*shape: int) -> Matrix:
    return np.zeros(shape, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Constructs the demo checkpoint.")
    parser.add_argument("directory", type=Path, nargs="?", default=checkpoint_directory())
    directory: Path = parser.parse_args().directory
    write_checkpoint(directory)
    print(f"Wrote the demo checkpoint to {directory}:")
    for path in sorted(directory.iterdir()):
        print(f"  {path.stat().st_size:>9,} bytes  {path.name}")


if __name__ == "__main__":
    main()
