"""Files that people write, as spreadsheets save them."""

from __future__ import annotations

import pytest

from stockpot.errors import ArgumentError, CheckpointError
from stockpot.evaluation.aggregate import aggregate_scores
from stockpot.files import read_table, read_text
from stockpot.runs.files import read_weights
from stockpot.runs.metrics import read_metrics_file


def test_tables_as_a_spreadsheet_saves_them(tmp_path):
    """With a mark at the beginning, Windows' line ends, spaces, a blank row, a quoted comma, a short row."""
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbfstep , weight,"note, if any"\r\n100,0.25,"a, b"\r\n,,\r\n200,0.75\r\n')
    names, rows = read_table(read_text(str(path), "a table", ArgumentError), str(path), ArgumentError)
    assert names == ["step", "weight", "note, if any"]
    assert rows == [(2, ["100", "0.25", "a, b"]), (4, ["200", "0.75"])]
    assert read_weights(str(path)) == {100: 0.25, 200: 0.75}
    assert [v for _, v in read_metrics_file(str(path)).series["weight"]] == [0.25, 0.75]


@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_only_line_ends_end_a_row(odd, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text(f"model,a,b\nx{odd}y,1,2\n", encoding="utf-8")
    assert [(r.name, r.score) for r in aggregate_scores(str(path), {"a": 1, "b": 1}, [])] == [(f"x{odd}y", 1.5)]


def test_a_short_row_lacks_its_last_columns(tmp_path):
    path = tmp_path / "weights.csv"
    path.write_text("step,weight,weight\n1,2\n")
    with pytest.raises(ArgumentError, match="step '1' with weight None"):
        read_weights(str(path))


def test_scores_as_a_spreadsheet_saves_them(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_bytes(b"\xef\xbb\xbfmodel,a,b\r\none,1,3\r\n")
    assert [(r.name, r.score) for r in aggregate_scores(str(path), {"a": 1, "b": 1}, [])] == [("one", 2.0)]


@pytest.mark.parametrize("error", [ArgumentError, CheckpointError])
def test_what_can_t_be_read(tmp_path, error):
    (tmp_path / "metrics.csv").write_bytes(b"step,loss\n1,\xff\n")
    with pytest.raises(error, match=r"metrics.csv: not a text file in UTF-8: invalid start byte at byte 12"):
        read_text(str(tmp_path / "metrics.csv"), "a table", error)
    with pytest.raises(error, match=r"here: .*metric.csv: can't be read: No such file.*did you mean 'metrics.csv'"):
        read_text(str(tmp_path / "metric.csv"), "a table", error, where="here: ")
    with pytest.raises(error, match=r"metrics.csv: 14 bytes is too large for a table"):
        read_text(str(tmp_path / "metrics.csv"), "a table", error, most=10)
