"""The losses that the page shows."""

import json

from mlx_gpt.serving import curves


def test_a_long_run_has_few_points_the_last_among_them(tmp_path):
    records = [{"step": i, "train_loss": 1 / i} for i in range(1, 3001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = curves.of(tmp_path / "checkpoints/step-00003000")
    assert len(found["train"]) == 500
    assert found["train"][-1] == [3000, 1 / 3000]
    assert found["val"] == []


def test_what_is_no_number_or_not_yet_whole_is_left_out(tmp_path):
    lines = [
        '{"step": 1, "val_loss": 5.0}',
        '{"step": 2, "val_loss": NaN}',
        '{"step": 3, "val_loss": null}',
        "[]",
        '{"step": 4, "va',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert curves.of(tmp_path) == {"train": [], "val": [[1, 5.0]]}


def test_a_model_without_a_run_has_none(tmp_path):
    assert curves.of(tmp_path / "model") == {"train": [], "val": []}
