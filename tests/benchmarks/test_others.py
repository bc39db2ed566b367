"""The other benchmarks run, and their tables show their results."""

import sys

import pytest

import learning
import report


def rows(done, *names):
    """The columns `names` of the result, after a check that the printed table is the result's."""
    assert done.code == 0, done.err
    assert sum(line.startswith("|") for line in done.out.splitlines()) == 2 + len(done.result["rows"])
    assert report.lines(done.result) == done.out.splitlines()
    return [tuple(row[name] for name in names) for row in done.result["rows"]]


def test_generation(benchmark):
    done = benchmark("generation.py", "--preset", "smoke", "--prompt-tokens", "4", "--new-tokens", "4", "--trials", "1")
    others = ["mlx-lm", "mlx-lm, mlx-gpt's BLAS"] if sys.platform == "linux" else ["mlx-lm"]
    programs = ["mlx-gpt", *others, "transformers"]
    assert rows(done, "batch", "program") == [(batch, program) for batch in (1, 8) for program in programs]
    shape = done.result["shapes"]["smoke"]
    assert shape["weight_bytes"] == 4 * (shape["n_params"] - 32 * 32)
    assert shape["cache_bytes"] == 2 * 4 * 2 * 32


def test_generation_against_a_checkout(benchmark, checkout):
    changed = ("mlx_gpt/generation/cache.py", "mlx_gpt/generation/engine.py", "benchmarks/generate_with.py")
    other = checkout("make_cache", "new_cache", *changed)
    arguments = ("--preset", "smoke", "--prompt-tokens", "4", "--new-tokens", "4", "--trials", "1")
    done = benchmark("generation.py", *arguments, "--against", str(other))
    programs = [(batch, program) for batch in (1, 8) for program in ("mlx-gpt", "mlx-gpt other")]
    assert rows(done, "batch", "program") == programs


def test_generation_against_no_checkout_is_refused(benchmark, tmp_path):
    done = benchmark(
        "generation.py", "--preset", "smoke", "--prompt-tokens", "4", "--new-tokens", "4", "--against", str(tmp_path)
    )
    assert done.code == 1
    assert done.err.splitlines()[-1] == f"Error: {tmp_path} is not a checkout of mlx-gpt."


def test_memory(benchmark):
    done = benchmark("memory.py", "--preset", "smoke", "--trials", "1")
    peaks = dict(rows(done, "program", "peak_memory"))
    assert list(peaks) == ["plain", "mlx-gpt", "mlx-gpt --grad-checkpoint"]
    assert peaks["mlx-gpt --grad-checkpoint"] < peaks["mlx-gpt"]


def test_loop(benchmark):
    done = benchmark("loop.py", "--preset", "smoke", "--trials", "1", "--steps", "2")
    assert rows(done, "shape", "program") == [("smoke", "bare step"), ("smoke", "mlx-gpt train")]
    assert done.result["rows"][1]["over_bare"]["median"] > 0


def test_learning(benchmark, tmp_path):
    text, picture = tmp_path / "text.txt", tmp_path / "curves.png"
    text.write_text("".join(f"The {i} ducks of pond {i % 7} swim to shore {i * i}.\n\n" for i in range(3000)))
    names = ["recipe", "nanoGPT"]  # the others differ from the recipe only by their settings
    chosen = [word for name in names for word in ("--contender", name)]
    done = benchmark(
        "learning.py", "--data", str(text), "--steps", "3", "--trials", "2", "--plot", str(picture), *chosen
    )
    found = rows(done, "program", "each", "curves")
    assert [name for name, _, _ in found] == names
    for _, each, curves in found:
        assert each[0] != each[1]  # two seeds
        assert all(curve[0]["step"] == 0 and curve[-1]["step"] == 3 for curve in curves)
        # Before the first step every network knows nothing, whatever its tokenizer.
        assert 3 < curves[0][0]["bits_per_byte"] < 6
    assert picture.stat().st_size > 5_000


def test_finetuning(benchmark, monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    sizes = ("--base-steps", "1", "--steps", "12", "--towns", "5", "--batch-size", "2", "--seq-len", "96")
    done = benchmark("finetuning.py", *sizes, "--trials", "1", "--threads", "1")
    found = rows(done, "program", "loss", "peak_memory")
    assert [name for name, _, _ in found] == ["mlx-gpt, adapters", "mlx-gpt, all weights", "mlx-lm, adapters"]
    before = done.result["shapes"]["qwen3"]["loss_before"]
    assert all(loss["median"] < before for _, loss, _ in found)
    assert found[0][2] < found[1][2]


def test_the_minutes_to_a_result_lie_between_two_evaluations():
    points = ((0, 4.0), (1, 2.0), (3, 1.0))
    curve = [{"minutes": float(minutes), "bits_per_byte": bits} for minutes, bits in points]
    assert learning.minutes_to(curve, 3.0) == 0.5
    assert learning.minutes_to(curve, 1.5) == 2.0
    assert learning.minutes_to(curve, 1.0) == 3.0
    assert learning.minutes_to(curve, 0.9) is None


def test_a_row_compares_a_contender_with_gpt2_and_adamw():
    def run(*points, **others):
        curve = [{"minutes": float(minutes), "bits_per_byte": bits} for minutes, bits in points]
        facts = {"steps": 100, "parameters": 5, "kind": "cpu", "dtype": "float32", "dropout": 0.0}
        return facts | {"curve": curve, "bits_per_byte": min(bits for _, bits in points), **others}

    adamw = [run((0, 4.0), (4, 2.0)), run((0, 4.0), (4, 1.0))]
    recipe = [run((0, 4.5), (2, 1.5), (4, 1.2), dropout=0.1), run((0, 4.5), (3, 1.5), (4, 1.2), dropout=0.1)]
    found = learning.row("recipe", recipe, {learning.ADAMW: adamw, "recipe": recipe})
    assert found["over_adamw"] == pytest.approx(1.2 / 1.5)
    assert found["minutes_to_adamw"] == pytest.approx(2.5)
    assert found["bits_per_byte"] == {"mean": pytest.approx(1.2), "spread": pytest.approx(0)}
    assert (found["dropout"], found["steps"]["median"]) == ([0.1, 0.1], 100)
    slow = [run((0, 4.0), (4, 1.6)), run((0, 4.0), (4, 1.4))]
    assert learning.row("slow", slow, {learning.ADAMW: adamw})["minutes_to_adamw"] is None  # one never got there


def test_learning_for_some_time(benchmark, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i} ducks of pond {i % 7} swim to shore {i * i}.\n\n" for i in range(3000)))
    chosen = [word for name in ("GPT-2, AdamW", "nanoGPT") for word in ("--contender", name)]
    done = benchmark("learning.py", "--data", str(text), "--minutes", "0.03", "--trials", "1", *chosen)
    for _, steps, (curve,) in rows(done, "program", "steps", "curves"):
        assert steps["median"] == curve[-1]["step"] > 0
        assert 0.03 <= curve[-1]["minutes"] < 0.5


def test_distributed(benchmark, monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # each rank would compile for itself
    done = benchmark("distributed.py", "--preset", "smoke", "--trials", "1", "--steps", "10")
    assert rows(done, "shape", "program") == [("smoke", "one process"), ("smoke", "2 ranks")]
    assert 0 <= done.result["rows"][1]["loss_difference"] < 1e-5
    assert done.result["rows"][1]["over_one"]["median"] > 0


def test_data(benchmark):
    done = benchmark("data.py", "--megabytes", "1", "--vocab-size", "300", "--trials", "1")
    programs = ["prepare", "learn the tokenizer", "tokenise", "prepare and tokenise", "all three"]
    assert rows(done, "megabytes", "program") == [(1, program) for program in programs]
    seconds = [row["seconds"]["median"] for row in done.result["rows"]]
    assert seconds[3:] == pytest.approx([seconds[0] + seconds[2], sum(seconds[:3])])
    assert seconds[4] * done.result["rows"][4]["megabytes_per_second"]["median"] == pytest.approx(1)


def test_startup(benchmark):
    done = benchmark("startup.py", "--trials", "1")
    assert rows(done, "program") == [("python -c pass",), ("mlx-gpt --help",)]


def test_serving(benchmark, monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    done = benchmark("serving.py", "--preset", "smoke", "--prompt-tokens", "4", "--new-tokens", "4", "--trials", "1")
    servers = ["mlx-gpt serve", "mlx_lm.server"]
    assert rows(done, "clients", "program") == [(clients, server) for clients in (1, 8, 64) for server in servers]
    assert [row["lost"] for row in done.result["rows"] if row["program"] == "mlx-gpt serve"] == [0, 0, 0]
