"""Files of any shape are read as a person reads them, or the loss is reported. `fuzz.py` tries it with more files."""

from mlx_gpt.data.corpus import normalise, open_corpus, prepare

from .fuzz import Maker, problems


def test_nothing_is_lost_in_silence(tmp_path):
    found, ends = problems(200, seed=10, folder=tmp_path)
    assert found == []
    assert min(ends.values()) > 20


def test_the_report_accounts_for_every_document(tmp_path):
    maker = Maker(1)
    made = [made for made in (maker.make() for _ in range(100)) if made.expected and not any(made.options.values())]
    paths = [tmp_path / f"{i}-{made.name}" for i, made in enumerate(made)]
    for path, one in zip(paths, made, strict=True):
        path.write_bytes(one.content)
    report = prepare(paths, tmp_path / "out")
    documents = [document for one in made for document in one.expected or ()]
    texts = {normalise(document) for document in documents if document is not None}
    assert len(texts) > 100
    assert (report.rows, report.kept) == (len(documents), len(texts))
    assert sum(report.dropped.values()) == documents.count(None) > 10
    assert sorted(report.dropped) == sorted(report.first)
    corpus = open_corpus(tmp_path / "out")
    assert {*corpus.documents("train"), *corpus.documents("val")} == texts
