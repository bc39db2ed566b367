"""Model directories: read, write, check.

A model directory is what transformers and mlx-lm read as a GPT-2: `config.json`, `model.safetensors` with unprefixed
names and the projections as (in, out), and the tokenizer's files.
"""

import dataclasses
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError, safe_open

from mlx_gpt.config import ModelConfig
from mlx_gpt.errors import UserError, shown
from mlx_gpt.files import write_text_whole, write_whole
from mlx_gpt.model import GPT
from mlx_gpt.settings import build
from mlx_gpt.tokenizer import Tokenizer

# GPT-2 stores these as (in, out), the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Decoding on a CPU takes some of the outputs of these at a time, which should lie in one piece.
SPLIT_BY_OUTPUT = ("attn.c_attn.weight", "mlp.c_fc.weight")
# Causal masks that old files store as if they were weights.
MASKS = (".attn.bias", ".attn.masked_bias")
FLOATS = ("F32", "F16", "BF16")
# GPT-2's config.json has 1 KB, and 100 layers make a header of 150 KB. What is read grows many times over in memory.
MAX_JSON, MAX_HEADER = 10**6, 10**6


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write a model directory, each file whole or not at all, the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text = tokenizer.backend.id_to_token(tokenizer.end_of_text)
    files = {
        "config.json": _config_json(model.config, tokenizer),
        "generation_config.json": {"eos_token_id": tokenizer.end_of_text, "bos_token_id": tokenizer.end_of_text},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end_of_text,
            "eos_token": end_of_text,
            "unk_token": end_of_text,
            "model_max_length": model.config.n_positions,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        write_text_whole(folder / name, json.dumps(content, indent=2) + "\n")
    write_text_whole(folder / "tokenizer.json", tokenizer.to_json())
    weights = {name: _turn(name, weight) for name, weight in tree_flatten(model.parameters())}
    # Without this metadata transformers refuses the file.
    write_whole(folder / "model.safetensors", lambda part: save_arrays(part, weights, {"format": "pt"}))


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays to a safetensors file.

    Raises:
        OSError: not all of it could be written.
    """
    try:
        mx.save_safetensors(str(path), arrays, metadata=metadata or {})
        with safe_open(path, framework="np"):
            pass  # the header is right and the file as long as it says: MLX's writer does not tell of a full disk
    except (RuntimeError, SafetensorError) as error:
        raise OSError(errno.EIO, f"the disk did not take it: {error}") from None


def load_model(folder: str | Path) -> GPT:
    """Read the network of a model directory, ours or any GPT-2's.

    Raises:
        UserError: a file is missing, damaged or of another architecture; the sentence names the tensor and the shapes.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / "model.safetensors"
    stored = _header(path)
    _check_dimensions(path, config, stored)
    expected = _shapes(config)
    _check_shapes(path, stored, expected)
    if surplus := sorted(stored.keys() - expected.keys() - {"lm_head.weight"}):
        raise UserError(
            f"{path} has a tensor {shown(surplus[0])}, which no GPT-2 has: it belongs to another architecture."
        )

    arrays = _arrays(path)
    model = GPT(config)
    if "lm_head.weight" in arrays and not mx.array_equal(arrays["lm_head.weight"], arrays["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight, but GPT-2's head is its embedding.")
    model.update(tree_unflatten([(name, _laid_out(name, arrays.pop(name)).astype(mx.float32)) for name in expected]))
    mx.eval(model.parameters())  # the reader is lazy: have it all while the file is there
    return model


def load_tokenizer(folder: str | Path, model: GPT) -> Tokenizer:
    """Read the tokenizer of a model directory.

    Raises:
        UserError: there is none, or it has ids that the model does not know.
    """
    end_of_text = _read_json(Path(folder) / "config.json").get("eos_token_id")
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer.json", end_of_text if isinstance(end_of_text, int) else None)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} entries and the weights "
            f"{model.config.vocab_size:,}: they don't belong together."
        )
    return tokenizer


def read_config(folder: Path) -> ModelConfig:
    """The `ModelConfig` in a directory's `config.json`.

    Raises:
        UserError: it is missing, no JSON, or describes something that this GPT-2 is not.
    """
    path = folder / "config.json"
    config = _read_json(path)
    if config.get("model_type") != "gpt2":
        kind = shown(config.get("model_type", "no model"))
        raise UserError(f"{path} describes {kind}: mlx-gpt reads GPT-2 (`model_type` gpt2) only.")
    asked = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * config["n_embd"] if isinstance(config.get("n_embd"), int) else None),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, fine in asked.items():
        if key in config and config[key] not in fine:
            found = shown(repr(config[key]))
            raise UserError(f"{path}: `{key}` {found} is not GPT-2's ({fine[0]!r}), which is all that mlx-gpt has.")
    names = ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions")
    if missing := [name for name in names if name not in config]:
        raise UserError(f"{path} lacks `{missing[0]}`: fetch the directory again.")
    values = {name: config[name] for name in names} | {"dropout": config.get("resid_pdrop", 0.0)}
    try:
        model_config: ModelConfig = build(ModelConfig, values)
    except UserError as error:
        raise UserError(f"{path}: {shown(str(error).splitlines()[0], 200)}") from None
    epsilon = config.get("layer_norm_epsilon", ModelConfig.layer_norm_epsilon)
    if model_config.n_embd % model_config.n_head:
        sizes = f"`n_embd` {shown(model_config.n_embd)} can't be shared by `n_head` {shown(model_config.n_head)}"
        raise UserError(f"{path}: {sizes}.")
    if not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        raise UserError(f"{path}: `layer_norm_epsilon` must be between 0 and 1, not {shown(repr(epsilon))}.")
    return dataclasses.replace(model_config, layer_norm_epsilon=epsilon)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON or not path.is_file():
            raise ValueError
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no model directory: it has no {path.name}.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON: fetch the directory again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object: fetch the directory again.")
    return config


def _config_json(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.n_positions,
        "n_ctx": config.n_positions,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "activation_function": "gelu_new",
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "dtype": "float32",
    }


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a safetensors file, by plain name. The library checks sizes, offsets and overlaps."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with path.open("rb") as start:
            size = int.from_bytes(start.read(8), "little")
        if MAX_HEADER < size < path.stat().st_size:
            raise UserError(f"{path} has a header of {size:,} bytes, which no GPT-2 needs: do not use it.")
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.endswith(MASKS):
                    continue
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in FLOATS:
                    kind = f"{shown(name)} is {tensor.get_dtype()}"
                    raise UserError(f"{path}: tensor {kind}; weights are one of {FLOATS}.")
                if _plain(name) in shapes:
                    raise UserError(f"{path} has tensor {shown(name)} with the prefix and without: fetch it again.")
                shapes[_plain(name)] = tuple(tensor.get_shape())
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: mlx-gpt reads weights from safetensors only.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({shown(error, 200)}): fetch it again.") from None
    return shapes


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the file of such a GPT-2, by name: found with one block, for `n_layer` may be absurd."""
    one = tree_flatten(GPT(dataclasses.replace(config, n_layer=1)).parameters())
    shapes = {name: tuple(_turn(name, weight).shape) for name, weight in one}
    blocks = {
        name.replace(".0.", f".{i}.", 1): shape
        for i in range(config.n_layer)
        for name, shape in shapes.items()
        if name.startswith("h.0.")
    }
    return {name: shape for name, shape in shapes.items() if name not in blocks} | blocks


def _arrays(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by plain name, not read yet."""
    try:
        return {_plain(name): array for name, array in mx.load(str(path)).items()}
    except RuntimeError as error:  # of a mask, for only masks may be of any kind
        raise UserError(f"{path} can't be read ({shown(error, 200)}): fetch it again.") from None


def _check_dimensions(path: Path, config: ModelConfig, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config whose sizes are not the file's, before anything of those sizes is made."""
    asked = {"wte.weight": (config.vocab_size, config.n_embd), "wpe.weight": (config.n_positions, config.n_embd)}
    _check_shapes(path, stored, asked)
    if config.n_layer > len(stored):
        layers = shown(config.n_layer)
        raise UserError(f"{path} holds {len(stored)} tensors, too few for the {layers} layers of config.json.")


def _check_shapes(path: Path, stored: Mapping[str, tuple[int, ...]], asked: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in asked.items():
        if name not in stored:
            raise UserError(f"{path} has no tensor {name}, which config.json asks for: fetch the directory again.")
        if stored[name] != shape:
            both = f"{shown(stored[name])}, config.json asks for {shown(shape)}"
            raise UserError(f"{path}: tensor {name} has shape {both}.")


def _plain(name: str) -> str:
    """A tensor's name without the prefix that transformers writes."""
    return name.removeprefix("transformer.")


def _turn(name: str, weight: mx.array) -> mx.array:
    """Between nn.Linear's (out, in) and the file's (in, out); its own inverse."""
    return weight.T if name.endswith(CONV1D) else weight


def _laid_out(name: str, weight: mx.array) -> mx.array:
    """As nn.Linear has it, the rows of `SPLIT_BY_OUTPUT` one after the other in memory."""
    weight = _turn(name, weight)
    return mx.contiguous(weight) if name.endswith(SPLIT_BY_OUTPUT) else weight
