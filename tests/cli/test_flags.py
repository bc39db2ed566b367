"""Every flag of `train` and `generate` has an effect.

Each flag has the test that is named after it. The other settings come from `TINY` in conftest.py: two steps at a rate
of 0.01, each of two windows of 16 tokens, and one evaluation before and one after.
"""

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mlx_gpt import cli
from mlx_gpt.cli.generate import DEMO_PROMPTS, DIVIDER
from mlx_gpt.device import device
from mlx_gpt.models import base as base_layers

from .conftest import TINY

pytestmark = pytest.mark.usefixtures("unmeasured")


def flags_of(command):
    """Return the names of all flags of a command."""
    context = cli.cli.make_context("mlx-gpt", ["doctor"])
    found = cli.cli.get_command(context, command)
    assert found
    return {name for parameter in found.params for name in parameter.opts if name.startswith("--")}


def tried(command):
    """Return the flags that have a test here."""
    beginning = f"test_{command}_"
    tests = [name.removeprefix(beginning) for name in globals() if name.startswith(beginning)]
    return {f"--{name.replace('_', '-')}" for name in tests}


# ---- train ----------------------------------------------------------------------------------------------------------


def test_train_data(train, base):
    assert train("--data", "builtin").train_tokens > 10 * base.train_tokens


def test_train_documents(train, text):
    assert "kept     300 documents" in train("--data", text, "--documents", "line").out
    assert "kept     1 document " in train("--data", text, "--documents", "file", out="other").out


def test_train_column(train, tmp_path):
    rows = [f"{word} {i} looks on,{word} {i} dives\n" for word in ("duck", "goose") for i in range(30)]
    (tmp_path / "two.csv").write_text("a,b\n" + "".join(rows))
    train("--data", "two.csv", "--column", "b")
    (prepared,) = tmp_path.glob("data/cache/*/train.jsonl")
    assert "dives" in prepared.read_text()
    assert "looks" not in prepared.read_text()


def test_train_val_fraction(train, text):
    lines = ["--data", text, "--documents", "line"]
    tenth, half = train(*lines, "--val-fraction", "0.1"), train(*lines, "--val-fraction", "0.5", out="half")
    assert half.train_tokens < 0.7 * tenth.train_tokens


def test_train_tokenizer(train, base):
    assert base.config["vocab_size"] == 259
    learnt = train("--tokenizer", "bpe", "--vocab-size", "300")
    assert learnt.config["vocab_size"] == 300
    theirs = train("--tokenizer", "run/final/tokenizer.json", out="other")
    assert theirs.config["vocab_size"] == 300


def test_train_loss_on(train, tmp_path):
    talk = [{"role": "user", "content": "Duck?"}, {"role": "assistant", "content": "Pond."}]
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(2 * (json.dumps({"messages": talk}) + "\n"))
    lines = ["--data", tmp_path, "--n-positions", "64", "--seq-len", "64", "--max-epochs", "99"]
    answers, everything = train(*lines), train(*lines, "--loss-on", "all", out="other")
    assert answers.column("train_loss") != everything.column("train_loss")


def test_train_init_from(train, base):
    again = train("--init-from", base.folder.resolve(), "--eval-windows", "0")
    assert again.column("val_loss")[0] == pytest.approx(min(base.column("val_loss")), rel=1e-6)


def test_train_from(train, base):
    by_its_short_name = train("--from", base.folder.resolve(), out="one")
    assert by_its_short_name.weights == train("--init-from", base.folder.resolve(), out="two").weights


def adapters_of(run):
    """Return the adapters of a run, and their description."""
    folder = run.folder / "final/adapters"
    return load_file(folder / "adapters.safetensors"), json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def tune(train, base):
    """Train adapters beside the weights of the other run."""
    return lambda *flags, out="run": train("--from", base.folder.resolve(), "--lora-rank", "2", *flags, out=out)


def test_train_lora_rank(tune):
    arrays, _ = adapters_of(tune())
    assert {min(array.shape) for array in arrays.values()} == {2}


def test_train_lora_layers(train, tune):
    train("--n-layer", "2", out="deep")
    arrays, described = adapters_of(tune("--n-layer", "2", "--from", "deep", "--lora-layers", "1"))
    assert {name.split(".")[2] for name in arrays} == {"1"}
    assert described["num_layers"] == 1


def test_train_lora_scale(tune):
    assert adapters_of(tune("--lora-scale", "3"))[1]["lora_parameters"]["scale"] == 3.0


def test_train_lora_dropout(tune):
    assert tune().weights != tune("--lora-dropout", "0.5", out="dropped").weights


def test_train_vocab_size(train):
    assert train("--tokenizer", "bpe", "--vocab-size", "290").shape("wte.weight") == (290, 16)


def test_train_preset(mlx_gpt, corpus, folder_of):
    short = ("--tokenizer", "bytes", "--seq-len", "8", "--batch-size", "1", "--max-steps", "1", "--eval-windows", "1")
    assert mlx_gpt("train", "--data", corpus, "--preset", "tiny", "--out", "run", *short).code == 0
    config = folder_of("run").config
    assert (config["n_layer"], config["n_embd"], config["n_positions"]) == (4, 128, 256)


def test_train_config(train, base, tmp_path):
    (tmp_path / "my.toml").write_text("seed = 5\nn_head = 8\n")
    run = train("--config", "my.toml")
    assert run.weights == train("--seed", "5", out="other").weights != base.weights
    assert run.config["n_head"] == 2  # from the flag, which wins


def test_train_out(train, tmp_path):
    train(out="elsewhere/deep")
    assert (tmp_path / "elsewhere/deep/final/model.safetensors").exists()
    assert not (tmp_path / "weights").exists()


def test_train_resume(mlx_gpt, train, folder_of):
    train()
    assert mlx_gpt("train", "--resume", "run", "--max-steps", "3").code == 0
    assert mlx_gpt("train", "--out", "run", "--resume", "--max-steps", "4").code == 0
    assert folder_of("run").steps("train_loss") == [1, 2, 3, 4]


def test_train_overwrite(mlx_gpt, train, corpus):
    train("--seed", "1")
    assert mlx_gpt("train", "--data", corpus, "--out", "run").code == 2
    assert train("--overwrite", "--max-steps", "1").steps("train_loss") == [1]


def test_train_ignore_memory(mlx_gpt, corpus, monkeypatch):
    found = device()
    monkeypatch.setattr("mlx_gpt.training.setup.device", lambda: dataclasses.replace(found, usable=16 * 10_000))
    refused = mlx_gpt("train", "--data", corpus, *TINY, "--out", "run")
    assert refused.code == 2
    assert "--ignore-memory" in refused.err
    assert mlx_gpt("train", "--data", corpus, *TINY, "--out", "run", "--ignore-memory").code == 0


def test_train_model_type(train):
    run = train("--model-type", "qwen3")
    assert run.config["architectures"] == ["Qwen3ForCausalLM"]
    assert run.shape("model.layers.0.self_attn.k_proj.weight") == (16, 16)


def test_train_n_kv_head(train):
    run = train("--model-type", "qwen3", "--n-kv-head", "1")
    assert run.shape("model.layers.0.self_attn.k_proj.weight") == (8, 16)


def test_train_tie_embeddings(train):
    assert train("--model-type", "qwen3", "--no-tie-embeddings").shape("lm_head.weight") == (259, 16)


def test_train_n_layer(train):
    assert train("--n-layer", "2").shape("h.1.ln_1.weight") == (16,)


def test_train_n_head(train, base):
    run = train("--n-head", "4")
    assert run.config["n_head"] == 4
    assert run.column("train_loss") != base.column("train_loss")


def test_train_n_embd(train):
    assert train("--n-embd", "24").shape("wte.weight") == (259, 24)


def test_train_n_positions(train):
    assert train("--n-positions", "20").shape("wpe.weight") == (20, 16)


def test_train_dropout(train, base):
    run = train("--dropout", "0.5")
    assert run.column("val_loss")[0] == pytest.approx(base.column("val_loss")[0], rel=0.01)  # evaluation has no dropout
    assert run.column("train_loss") != base.column("train_loss")


def test_train_seq_len(train):
    assert train("--seq-len", "8").column("tokens")[1] == 2 * 8


def test_train_batch_size(train):
    assert train("--batch-size", "3").column("tokens")[1] == 3 * 16


def test_an_automatic_batch_size_is_kept_when_the_run_is_resumed(train):
    """It takes all 64 windows of a step at once, and a resume with the same flags does not choose again."""
    flags = ("--batch-size", "auto", "--gradient-accumulation-steps", "4")
    run = train(*flags)
    assert "Batch        64 x 16 tokens, 1 per step" in run.log
    assert "batch_size = 64\n" in (run.folder / "run.toml").read_text()
    again = train(*flags, "--resume", "--max-steps", "3")
    assert again.column("tokens")[-1] == 3 * 64 * 16


def test_train_gradient_accumulation_steps(train):
    assert train("--gradient-accumulation-steps", "5").column("tokens")[1] == 5 * 2 * 16


def test_train_max_steps(train):
    assert train("--max-steps", "3").steps("train_loss") == [1, 2, 3]


def test_train_max_epochs(train, base):
    steps = train("--max-steps", "50", "--max-epochs", "0.01").steps("train_loss")
    assert len(steps) == pytest.approx(0.01 * base.train_tokens / 32, abs=1)


def test_train_max_minutes(train):
    assert max(train("--max-steps", "50", "--max-minutes", "0.00001").steps("val_loss")) < 50


def test_train_recipe(train):
    run = train("--recipe", "quick")
    assert run.config["model_type"] == "qwen3"
    assert 'optimizer = "muon"' in (run.folder / "run.toml").read_text()
    assert train("--recipe", "quick", "--model-type", "gpt2", out="other").config["model_type"] == "gpt2"


def test_train_optimizer(train):
    run = train("--optimizer", "muon")
    state = load_file(run.folder / "checkpoints" / run.checkpoints[-1] / "optimizer.safetensors")
    means = {name.rpartition("h.0.")[2] for name in state if "h.0." in name}
    assert {"attn.c_attn.weight.v", "attn.c_attn.bias.m", "attn.c_attn.bias.v"} <= means  # Muon has no second mean
    assert "attn.c_attn.weight.m" not in means


def test_train_muon_learning_rate(train):
    slow, fast = (train("--optimizer", "muon", "--muon-learning-rate", rate, out=rate) for rate in ("0.01", "0.02"))
    assert slow.weights != fast.weights


def test_train_muon_momentum(train):
    short, long = (train("--optimizer", "muon", "--muon-momentum", decay, out=decay) for decay in ("0.5", "0.95"))
    assert short.weights != long.weights


def test_train_learning_rate(train):
    assert train("--learning-rate", "0.02").column("learning_rate")[0] == pytest.approx(0.02)


def test_train_min_lr(train):
    assert train("--min-lr", "0.005").column("learning_rate")[-1] == pytest.approx(0.005)


def test_train_warmup_steps(train):
    rates = train("--warmup-steps", "4").column("learning_rate")
    assert rates == pytest.approx([0.002, 0.004])


def test_train_schedule(train):
    def rates(schedule):
        return train("--schedule", schedule, "--max-steps", "4", out=schedule).column("learning_rate")

    assert rates("constant") == pytest.approx([0.01] * 4)
    assert rates("linear") == pytest.approx([0.01, 0.007, 0.004, 0.001])
    assert rates("cosine") == pytest.approx([0.01, 0.00775, 0.00325, 0.001])


def test_train_beta1(train, base):
    assert train("--beta1", "0.5").weights != base.weights


def test_train_beta2(train, base):
    assert train("--beta2", "0.5").weights != base.weights


def test_train_weight_decay(train, base):
    assert train("--weight-decay", "0.5").weights != base.weights


def test_train_max_grad_norm(train, base):
    assert max(base.column("grad_norm")) > 0.5
    run = train("--max-grad-norm", "0.5")
    assert run.column("grad_norm")[0] == base.column("grad_norm")[0]  # the norm is logged before clipping
    assert run.weights != base.weights


def test_train_log_every(train):
    assert train("--log-every", "2").steps("train_loss") == [2]


def test_train_eval_every(train):
    assert train("--eval-every", "1").steps("val_loss") == [0, 1, 2]


def test_train_eval_windows(train, base):
    run = train("--eval-windows", "1")
    assert run.column("val_loss") != base.column("val_loss")
    assert run.weights == base.weights


def test_train_save_every(train):
    assert train("--save-every", "1").checkpoints == ["step-00000001", "step-00000002"]


def test_train_max_bad_steps(mlx_gpt, corpus):
    # Such a rate ruins the weights in the first step, so that no later step has a finite loss.
    spoilt = ("--learning-rate", "1e38", "--max-steps", "9", "--out", "run")
    answer = mlx_gpt("train", "--data", corpus, *TINY, *spoilt, "--max-bad-steps", "2")
    assert answer.code == 1
    assert "3 steps in a row" in answer.err


def test_train_dry_run(mlx_gpt, corpus):
    answer = mlx_gpt("train", "--data", corpus, *TINY, "--out", "planned", "--dry-run")
    assert answer.code == 0
    for words in (
        "Model ",
        "Batch        2 x 16 tokens, 1 per step, activations kept",
        "Memory       about",
        "tokens/s measured)",
    ):
        assert words in answer.out
    assert not Path("planned").exists()


def test_train_grad_checkpoint(train, base, monkeypatch):
    recomputed, original = [], base_layers._recomputed

    def recompute(*call):
        recomputed.append(call)
        return original(*call)

    monkeypatch.setattr(base_layers, "_recomputed", recompute)
    run = train("--grad-checkpoint", out="recomputed")
    assert recomputed
    # The batch is computed as a whole instead of in two slices, so the sum has another order.
    assert run.column("train_loss") == pytest.approx(base.column("train_loss"), rel=1e-6)


def test_train_keep_checkpoints(train):
    assert train("--save-every", "1", "--keep-checkpoints", "1").checkpoints == ["step-00000002"]


def test_train_precision(train, base):
    losses = train("--precision", "bfloat16").column("train_loss")
    assert losses != base.column("train_loss")
    assert losses == pytest.approx(base.column("train_loss"), rel=0.01)


def test_train_report_to(train):
    run = train("--report-to", "tensorboard")
    assert list(run.folder.glob("tensorboard/events.out.tfevents.*"))


def test_train_seed(train, base):
    assert train("--seed", "2").weights != base.weights


def test_without_more_flags_training_gives_the_same_result(train, base):
    """Otherwise the differences above would prove nothing."""
    run = train()
    assert run.weights == base.weights
    assert run.column("train_loss") == base.column("train_loss")


def test_every_flag_of_train_has_a_test():
    assert flags_of("train") == tried("train")


# ---- generate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def generate(mlx_gpt, models):
    """Continue a prompt by twelve tokens with seed 1, unless the flags say otherwise, and return stdout."""

    def generate(*flags, stdin=""):
        short = ("--model", models / "one", "--max-tokens", "12", "--seed", "1")
        prompt = () if "--interactive" in flags else ("--prompt", "The duck swims")
        answer = mlx_gpt("generate", *short, *prompt, *flags, stdin=stdin)
        assert answer.code == 0, answer.err
        return answer.out

    return generate


@pytest.fixture
def likeliest(generate):
    """The text that always takes the likeliest token."""
    return generate("--temperature", "0")


def test_generate_model(generate, models):
    assert generate("--model", models / "two") != generate()


def test_generate_prompt(generate):
    text = generate("--prompt", "Geese look")
    assert text.startswith("Geese look")
    assert text.removeprefix("Geese look") != generate().removeprefix("The duck swims")


def test_generate_prompt_file(mlx_gpt, models, generate, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfThe duck swims\r\n")
    flags = ("--model", models / "one", "--max-tokens", "12", "--seed", "1")
    assert mlx_gpt("generate", *flags, "--prompt-file", "prompt.txt").out == generate()
    assert mlx_gpt("generate", *flags, "--prompt-file", "-", stdin="The duck swims\n").out == generate()
    lines = mlx_gpt("generate", *flags, "--prompt-file", "-", stdin="The duck\n\nGeese\n\n").out
    assert lines.startswith("The duck\n\nGeese\n")


def test_generate_interactive(generate):
    answer = generate("--interactive", stdin="The duck swims\n")
    assert answer == generate().removeprefix("The duck swims")


def test_generate_max_tokens(generate):
    short = generate("--max-tokens", "4").strip()
    assert len(short) < len(generate().strip())
    assert generate().startswith(short)


def test_generate_max_length(generate):
    assert generate("--max-length", "4") == generate("--max-tokens", "4") != generate()


def test_generate_temperature(generate, likeliest):
    assert likeliest == generate("--temperature", "0", "--seed", "2") != generate()


def test_generate_top_k(generate, likeliest):
    assert generate("--top-k", "1") == likeliest != generate()


def test_generate_top_p(generate, likeliest):
    assert generate("--top-p", "1e-6") == likeliest != generate()


def test_generate_min_p(generate, likeliest):
    assert generate("--min-p", "1") == likeliest != generate()


def test_generate_repetition_penalty(generate, likeliest):
    assert generate("--temperature", "0", "--repetition-penalty", "1") != likeliest


def test_generate_presence_penalty(generate):
    plain = ("--temperature", "0", "--repetition-penalty", "1")
    assert generate(*plain, "--presence-penalty", "2") != generate(*plain)


def test_generate_frequency_penalty(generate):
    plain = ("--temperature", "0", "--repetition-penalty", "1")
    assert generate(*plain, "--frequency-penalty", "2") != generate(*plain)


def test_generate_seed(generate):
    assert generate("--seed", "2") == generate("--seed", "2") != generate()


def test_generate_num_samples(generate):
    alone = [generate("--seed", str(1 + i)) for i in range(4)]
    assert generate("--num-samples", "4") == f"{DIVIDER}\n".join(alone)
    short = ("--num-samples", "4", "--stop", alone[0].removeprefix("The duck swims")[4:7])  # ends before the others
    assert generate(*short).split(f"{DIVIDER}\n")[1:] == [generate("--seed", str(2 + i), *short[2:]) for i in range(3)]


def test_generate_stop(generate):
    made = generate().removeprefix("The duck swims").rstrip("\n")
    stop = made[len(made) // 2 :][:2]
    assert generate("--stop", stop) == f"The duck swims{made[: made.index(stop)]}\n"
    first = min((made[3:5], made[6:8]), key=made.index)
    assert generate("--stop", made[6:8], "--stop", made[3:5]) == f"The duck swims{made[: made.index(first)]}\n"


def test_every_flag_of_generate_has_a_test():
    assert flags_of("generate") == tried("generate")


def test_without_a_prompt_a_few_are_continued(mlx_gpt, models):
    answer = mlx_gpt("generate", "--model", models / "one", "--max-tokens", "3")
    texts = answer.out.split(f"{DIVIDER}\n")
    assert [text.startswith(prompt) for text, prompt in zip(texts, DEMO_PROMPTS, strict=True)] == [True] * len(texts)


# ---- spelling of flags ----------------------------------------------------------------------------------------------


def test_underscores_are_dashes(generate, train):
    assert generate("--max_length", "4", "--top_k", "1") == generate("--max-tokens", "4", "--top-k", "1") != generate()
    assert train("--max_steps", "1", "--save_every=1").steps("train_loss") == [1]


def test_without_a_seed_every_text_is_different(mlx_gpt, models):
    same = ("generate", "--model", models / "one", "--prompt", "The duck", "--temperature", "3")
    assert mlx_gpt(*same).out != mlx_gpt(*same).out
