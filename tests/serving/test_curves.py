"""The loss curves that the page shows."""

import json

from mlx_gpt.serving.curves import Curves, load_curves


def test_a_long_run_is_thinned_out_but_keeps_its_last_point(tmp_path):
    records = [{"step": i, "train_loss": 1 / i} for i in range(1, 3001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curves = load_curves(tmp_path / "checkpoints/step-00003000")
    assert len(curves.train) == 500
    assert curves.train[-1] == [3000, 1 / 3000]
    assert curves.val == []


def test_unfinished_lines_and_values_that_are_no_numbers_are_left_out(tmp_path):
    lines = [
        '{"step": 1, "val_loss": 5.0}',
        '{"step": 2, "val_loss": NaN}',
        '{"step": 3, "val_loss": null}',
        "[]",
        '{"step": 4, "va',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert load_curves(tmp_path) == Curves(val=[[1, 5.0]])


def test_a_model_without_a_run_has_no_curves(tmp_path):
    assert load_curves(tmp_path / "model") == Curves()
