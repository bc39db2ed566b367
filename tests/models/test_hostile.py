"""Hostile model directories give one sentence or a model, and nothing else."""

import json
import random
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mlx_gpt import load
from mlx_gpt.errors import UserError
from mlx_gpt.models import gpt2
from mlx_gpt.models.directory import save_model

EACH = 10  # times, each kind of damage is done
DTYPES = [
    "F64",
    "F16",
    "BF16",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "C64",
    "f32",
    "",
    "\n",
    None,
    32,
    ["F32"],
]
NAMES = ["", "..", "/etc/passwd", "a\nb\x1b[2J", "x" * 10_000, "wte.weight", "transformer.wte.weight", "__metadata__"]
NAMES += ["h.0.attn.bias", "h.-1.mlp.c_fc.bias", "h.999999999999.ln_1.weight", "lm_head.weight", "\udcff", "🦆", "NaN"]
NUMBERS: list[Any] = [
    -1,
    0,
    1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.5,
    1e308,
    True,
    None,
    "7",
    [],
    {},
]
VALUES: list[Any] = [
    *NUMBERS,
    -(10**30),
    10**4000,
    float("nan"),
    float("inf"),
    "relu",
    "a\nb\x1b[2J",
    "x" * 10_000,
    [[]],
    {"a": 1},
]
DEPTHS = [10, 100, 127, 128, 1000, 100_000]


@pytest.fixture(scope="module")
def sound(make_model, bpe, tmp_path_factory):
    """A model directory to make hostile ones from."""
    folder = tmp_path_factory.mktemp("sound")
    save_model(folder, make_model(), bpe)
    return folder


def nested(draw):
    depth = draw.choice(DEPTHS)
    return draw.choice(["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth])


def raw_damage(content, draw):
    """Damage a file without any knowledge of its format."""
    place = draw.randrange(len(content))
    kind = draw.randrange(5)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + draw.randbytes(draw.choice([1, 8, 100])) + content[place:]
    if kind == 2:
        return content[:place] + draw.randbytes(draw.choice([1, 8, 100])) + content[place + 8 :]
    if kind == 3:
        return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    return b""


# ---- model.safetensors ----------------------------------------------------------------------------------------------


def some_tensor(header, draw):
    return header[draw.choice([name for name in header if name != "__metadata__"])]


def another_dtype(header, draw):
    some_tensor(header, draw)["dtype"] = draw.choice(DTYPES)


def another_shape(header, draw):
    tensor = some_tensor(header, draw)
    shape = list(tensor["shape"])
    shapes = [
        [*shape, 1],
        shape[::-1],
        [],
        [0],
        [2**62, 4],
        [2**40, 0],
        [[1]],
        None,
        "32",
        shape[0],
        [str(n) for n in shape],
    ]
    tensor["shape"] = draw.choice([*shapes, *([number, *shape[1:]] for number in NUMBERS)])


def another_place(header, draw):
    """Beyond the file, before it, over another tensor, backwards, or nowhere."""
    tensor, other = some_tensor(header, draw), some_tensor(header, draw)
    begin, end = tensor["data_offsets"]
    shift = draw.choice([-8, -4, -1, 1, 4, 8, 2**31, 2**62])
    places: list[Any] = [
        [begin + shift, end + shift],
        [begin, end + shift],
        [end, begin],
        [begin],
        [begin, end, end],
        None,
        {},
    ]
    places += [other["data_offsets"], [0, 2**63], *([number, number] for number in NUMBERS)]
    tensor["data_offsets"] = draw.choice(places)


def swapped_places(header, draw):
    tensor, other = some_tensor(header, draw), some_tensor(header, draw)
    tensor["data_offsets"], other["data_offsets"] = other["data_offsets"], tensor["data_offsets"]


def another_name(header, draw):
    name = draw.choice([name for name in header if name != "__metadata__"])
    header[draw.choice(NAMES)] = header.pop(name)


def one_without(header, draw):
    del header[draw.choice([name for name in header if name != "__metadata__"])]


def one_with_something_else(header, draw):
    name = draw.choice(list(header))
    header[name] = draw.choice([None, [], {}, 3, "F32", {"dtype": "F32"}, {**some_tensor(header, draw), "more": 1}])


def some_more(header, draw):
    """Without any bytes of their own, so that the offsets stay as they are."""
    for name in draw.sample(NAMES, 3):
        shape = draw.choice([[0], [2**40, 0], [0, 2**63], [0, 2**64], [0, -1], [2**31, 0, 2**31]])
        header.setdefault(name, {"dtype": draw.choice(DTYPES), "shape": shape, "data_offsets": [0, 0]})


def other_metadata(header, draw):
    header["__metadata__"] = draw.choice(
        [*NUMBERS, {"format": None}, {"format": "tf"}, {"a": {"b": 1}}, {"x": "y" * 10**5}]
    )


HEADERS = [
    another_dtype,
    another_shape,
    another_place,
    swapped_places,
    another_name,
    one_without,
    one_with_something_else,
]
HEADERS += [some_more, other_metadata]


def take_apart(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(path, text, body, length=None):
    length = len(text) if length is None else length
    path.write_bytes((length % 2**64).to_bytes(8, "little") + text + body)


def change_header(change):
    def damage(folder, draw):
        path = folder / "model.safetensors"
        header, body = take_apart(path)
        change(header, draw)
        more = bytes(draw.choice([0, 0, 0, 1, 8]))
        put_together(path, json.dumps(header).encode("utf-8", "surrogatepass"), body + more)

    damage.__name__ = change.__name__
    return damage


def a_tensor_twice(folder, draw):
    """Readers differ in which of two equal keys they believe."""
    path = folder / "model.safetensors"
    header, body = take_apart(path)
    name = draw.choice([name for name in header if name != "__metadata__"])
    other = {**header[name], "shape": draw.choice([header[name]["shape"][::-1], [1], [32, 32], None])}
    texts = [f"{json.dumps(name)}:{json.dumps(tensor)}" for tensor in draw.sample([header[name], other], 2)]
    text = json.dumps(header).replace(f"{json.dumps(name)}: {json.dumps(header[name])}", ",".join(texts))
    put_together(path, text.encode(), body)


def with_and_without_the_prefix(folder, draw):
    """The same tensor by two names, of different shapes: readers differ in which comes last."""
    path = folder / "model.safetensors"
    header, body = take_apart(path)
    name = draw.choice([name for name in header if name != "__metadata__"])
    twin = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for name_there, tensor in header.items():
        if name_there != "__metadata__":
            tensor["data_offsets"] = [place + 4 for place in tensor["data_offsets"]]
    items = [*header.items(), (f"transformer.{name}", twin)]
    draw.shuffle(items)
    put_together(path, json.dumps(dict(items)).encode(), bytes(4) + body)


def a_mask(folder, draw):
    """Of any kind, for masks are not read; it is all there."""
    path = folder / "model.safetensors"
    header, body = take_apart(path)
    name = draw.choice(["h.0.attn.bias", "transformer.h.0.attn.masked_bias", "x.attn.bias", "h.0.attn.bias.attn.bias"])
    dtype, size = draw.choice([("F64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1), ("F4", 0.5), ("C64", 8), ("BOOL", 1)])
    shape = draw.choice([[int(8 / size)], [0], [1, 0, 2**40]])
    end = len(body) if 0 in shape else len(body) + 8
    mask = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), end]}
    put_together(path, json.dumps({**header, name: mask}).encode(), body + bytes(end - len(body)))


def another_length(folder, draw):
    path = folder / "model.safetensors"
    header, body = take_apart(path)
    text = json.dumps(header).encode()
    lengths = [
        0,
        1,
        7,
        len(text) - 1,
        len(text) + 1,
        len(text) + len(body),
        10**8,
        10**8 + 1,
        2**31,
        2**60,
        2**63,
        -1,
        -8,
    ]
    put_together(path, text, body, draw.choice(lengths))


def no_such_header(folder, draw):
    header, body = take_apart(folder / "model.safetensors")
    text = json.dumps(header).encode()
    texts = [b"", b"null", b"[]", b"{", b"\xff" + text, text[:-1] + b"\xc3}", b"\xef\xbb\xbf" + text, b"\0" * 8 + text]
    texts += [b" " * 9 + text, text + b" " * 9, text + b"\n\0", text + text, text.replace(b"F32", b"\xed\xa0\x80", 1)]
    put_together(folder / "model.safetensors", draw.choice(texts), body)


def a_deep_header(folder, draw):
    header, body = take_apart(folder / "model.safetensors")
    deep = draw.choice([nested(draw), json.dumps(header)[:-1] + f', "deep": {nested(draw)}' + "}"])
    put_together(folder / "model.safetensors", deep.encode(), body)


# ---- config.json and tokenizer.json ---------------------------------------------------------------------------------


def change_json(name, most):
    """Change so many values, wherever they stand."""

    def damage(folder, draw):
        tree = json.loads((folder / name).read_text())
        for _ in range(most):
            inside, key = tree, draw.choice(list(tree))
            while isinstance(inside[key], (dict, list)) and inside[key] and draw.random() < 0.7:
                inside = inside[key]
                key = draw.choice(list(inside)) if isinstance(inside, dict) else draw.randrange(len(inside))
            if draw.random() < 0.2 and isinstance(inside, dict) and len(inside) > 1:
                del inside[key]
            else:
                inside[key] = json.loads(json.dumps(draw.choice(VALUES)))
        (folder / name).write_text(json.dumps(tree))

    damage.__name__ = f"{most} in {name}"
    return damage


def raw(name):
    def damage(folder, draw):
        (folder / name).write_bytes(raw_damage((folder / name).read_bytes(), draw))

    damage.__name__ = f"raw damage to {name}"
    return damage


def deep(name):
    def damage(folder, draw):
        text = (folder / name).read_text()
        (folder / name).write_text(draw.choice([nested(draw), text.rstrip()[:-1] + f', "deep": {nested(draw)}' + "}"]))

    damage.__name__ = f"a deep {name}"
    return damage


def impossible_sizes(folder, draw):
    config = json.loads((folder / "config.json").read_text())
    for name in draw.sample(["vocab_size", "n_layer", "n_head", "n_embd", "n_positions"], draw.choice([1, 2, 5])):
        config[name] = draw.choice([2 * config[name], 10**6, 2**31, 2**40, 10**18, 10**30, -32, 0])
    (folder / "config.json").write_text(json.dumps(config))


def what_the_tokenizer_library_can_t_take(folder, draw):
    """Some of it makes the library panic, which is no ordinary exception."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    key, value = draw.choice(
        [
            ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            ("model", {**bpe, "continuing_subword_prefix": "##"}),
            ("model", {**bpe, "vocab": {"a": 2**32 - 1, "b": 1, "ab": 2}}),
            ("model", {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}),
            ("model", {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.1]]}),
            ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False}),
            ("version", "2.0\n"),
            ("added_tokens", [{"id": 2**32 - 1, "content": "<|endoftext|>", "special": True}]),
        ]
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {key: value}))


DAMAGES = [change_header(change) for change in HEADERS]
DAMAGES += [a_tensor_twice, a_mask, with_and_without_the_prefix, another_length, no_such_header, a_deep_header]
DAMAGES += [impossible_sizes, what_the_tokenizer_library_can_t_take]
DAMAGES += [change_json("config.json", most) for most in (1, 1, 2, 3, 4)]
DAMAGES += [change_json("tokenizer.json", most) for most in (1, 2, 4)]
DAMAGES += [raw(name) for name in ("config.json", "model.safetensors", "tokenizer.json")]
DAMAGES += [deep(name) for name in ("config.json", "tokenizer.json")]


def test_there_are_300_of_them():
    assert len(DAMAGES) * EACH == 300


def shapes_of(model):
    return {name: weight.shape for name, weight in tree_flatten(model.parameters())}


@pytest.mark.parametrize("number", range(len(DAMAGES)), ids=lambda number: DAMAGES[number].__name__)
def test_it_is_one_sentence_or_a_model(sound, tmp_path, number):
    for i in range(EACH):
        folder = tmp_path / "model"
        shutil.copytree(sound, folder)
        DAMAGES[number](folder, random.Random(100 * number + i))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        started = time.perf_counter()
        try:
            model, _ = load(folder)
        except UserError as error:
            sentence = str(error)
            assert sentence.isprintable(), i
            assert sentence.endswith("."), i
            assert len(sentence) < len(str(folder)) + 350, i
        else:
            expected = gpt2.Model(model.args)
            assert shapes_of(model) == shapes_of(expected), i
        assert time.perf_counter() - started < 10, i
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        shutil.rmtree(folder)


# ---- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from mlx_gpt import load
from mlx_gpt.errors import UserError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
load(sys.argv[1])
for folder in sys.argv[2:]:
    before = peak()
    try:
        load(folder)
    except UserError:
        print(peak() - before)
    else:
        print("loaded")
"""


def absurd(sound, folder):
    """Small files that claim to be large, or whose contents grow when they are read."""
    header, body = take_apart(sound / "model.safetensors")
    config = json.loads((sound / "config.json").read_text())
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    def model(name, header=header, body=body, length=None, **changes):
        shutil.copytree(sound, folder / name)
        put_together(folder / name / "model.safetensors", json.dumps(header).encode(), body, length)
        (folder / name / "config.json").write_text(json.dumps(config | changes))

    model("vocabulary", vocab_size=10**12)
    model("layers", n_layer=10**12)
    model("layers that are named", {**header, **{f"h.{n}.ln_1.bias": empty for n in range(2, 9000)}}, n_layer=8000)
    model("tensor", {**header, "wte.weight": {**header["wte.weight"], "shape": [10**12, 32]}}, vocab_size=10**12)
    model("length", length=99 * 10**6)
    model("header", {**header, **{f"h.{n}.attn.bias": empty for n in range(60_000)}})
    model("config", deep=[[]] * 10**6)
    return sorted(folder.iterdir())


def test_absurd_sizes_take_no_memory(sound, tmp_path):
    folders = absurd(sound, tmp_path)
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, sound, *folders], capture_output=True, text=True, check=True
    )
    grown = [int(line) for line in answer.stdout.split()]
    assert len(grown) == len(folders)
    for folder, size in zip(folders, grown, strict=True):
        files = sum(path.stat().st_size for path in folder.iterdir())
        assert size < 2 * files + 8e6, f"{folder.name}: {size / 1e6:.0f} MB for {files / 1e6:.1f} MB"
