"""Records in tables: columns that runs of different lengths share, means of seeds and paired differences by hand."""

import math

import pytest
from small import CPU

from core import report
from core.measure import MULTIPLES
from lab import tables

LENGTHS = [8, 16, 32]


def record(*losses):
    return {"train_length": 16, "lengths": LENGTHS[: len(losses)], "loss": list(losses), "windows": 4}


def test_a_pivot_puts_cells_where_their_row_and_column_meet():
    cells = [(("a", "x"), 2.0, "1"), (("b", "y"), 0.5, "2"), (("a", "x"), "last", "3"), (("b", "y"), 16, "4")]
    assert tables.pivot(["run", ""], cells) == [
        "| run |  | 0.5 T | 2 T | 16 T | last |",
        "|---|---|---|---|---|---|",
        "| a | x | no position | 1 | no position | 3 |",
        "| b | y | 2 | no position | 4 |  |",
    ]
    assert tables.pivot(["run"], [(("a",), 1, "5")], "loss at {:g} T")[0] == "| run | loss at 1 T |"


def test_means_and_paired_differences():
    records = {
        "rope": [record(3.0, 1.0, 2.0), record(3.0, 2.0, 4.0), record(3.0, 3.0, 6.0)],
        "learned": [record(3.0, 1.1), record(3.0, 2.4), record(3.0, 3.1)],
    }
    lines = tables.seeds_table(records, [7, 8, 9], "loss")
    assert lines[0] == "| nats per token |  | 0.5 T | 1 T | 2 T |"
    assert lines[2] == "| rope | mean | **3.000** | **2.000** | **4.000** |"
    assert lines[5] == "| rope | seed 9 | 3.000 | 3.000 | 6.000 |"
    # Differences .1, .4, .1: mean .2, standard deviation sqrt(.06 / 2), error that over sqrt(3).
    assert lines[-1] == "| learned | less rope | +0.000 ± 0.000 | +0.200 ± 0.100 | no position |"
    assert "±" not in tables.seeds_table({name: many[:1] for name, many in records.items()}, [7], "loss")[-1]
    assert tables.with_error([0.25, 0.75], "{:.1%}") == "+50.0% ± 25.0%"
    means = {name: tables.mean(many) for name, many in records.items()}
    assert means["rope"] == record(3.0, 2.0, 4.0)
    assert tables.ratio_table(means)[2:] == [
        "| rope | 2.72 | 1.00 | 7.39 |",
        "| learned | 2.23 | 1.00 | no position |",
    ]


def test_a_length_breaks_nothing_while_perplexity_is_within_five_percent():
    def result(*losses):
        return {"train_length": 10, "lengths": [5, 10, 15, 20, 40][: len(losses)], "loss": list(losses)}

    assert tables.not_broken_to(result(9, 1, 1 + math.log(1.049), 1, 1.1)) == 2
    assert tables.not_broken_to(result(9, 1, 1 + math.log(1.051), 1, 1)) == 1  # what comes back later does not count
    assert tables.not_broken_to(result(9, 1, 0.9, 0.8, 0.7)) == 4
    assert tables.not_broken_to(result(9)) is None


def test_runs_of_two_lengths_share_their_columns():
    results = {}
    for T in (128, 512):
        lengths = [round(T * multiple) for multiple in MULTIPLES]  # 141 / 128 and 563 / 512 are 1.1 T
        results[str(T)] = {"train_length": T, "lengths": lengths, "loss": [1.0] * len(lengths), "windows": 4}
    lines = tables.table(results, "loss")
    assert "no position" not in "".join(lines)
    assert lines[0].count("1.1 T") == 1


def test_write_table_leaves_the_rest_of_the_page_alone(tmp_path):
    page = tmp_path / "page.md"
    for between in ("", "| old |\n", "<!-- bench -->\n\n"):
        page.write_text(f"before\n<!-- x -->\n{between}<!-- /x -->\nafter\n", encoding="utf-8")
        report.write_table(page, "x", ["| \\1 |"], "python x.py", CPU)
        text = page.read_text(encoding="utf-8")
        assert text.startswith("before\n<!-- x -->\n| \\1 |\n\nMade by")
        assert text.endswith(".\n<!-- /x -->\nafter\n")
        assert "old" not in text


def test_write_table_takes_a_name_as_it_is(tmp_path):
    (tmp_path / "page.md").write_text("before\n<!-- c++ (2) -->\n<!-- /c++ (2) -->\n", encoding="utf-8")
    report.write_table(tmp_path / "page.md", "c++ (2)", ["| a |"], "python x.py", CPU)
    assert (tmp_path / "page.md").read_text(encoding="utf-8").startswith("before\n<!-- c++ (2) -->\n| a |\n")


def test_write_table_without_markers_is_the_whole_file(tmp_path):
    report.write_table(tmp_path / "new.md", "bench", ["| a |"], "python x.py", CPU, seed=3)
    text = (tmp_path / "new.md").read_text(encoding="utf-8")
    assert text.startswith("| a |\n\nMade by `python x.py`: seed 3, commit ")


def test_write_table_leaves_line_ends_and_bytes_of_a_page_as_they_are(tmp_path):
    page = tmp_path / "page.md"
    page.write_bytes(b"\xff\r\n<!-- x -->\r\nold\r\n<!-- /x -->\r\nend\r\n")
    report.write_table(page, "x", ["| new |"], "python x.py", CPU)
    begin, text, end = page.read_bytes().partition(b"| new |\n")
    assert begin == b"\xff\r\n<!-- x -->\r\n" and end.endswith(b".\n<!-- /x -->\r\nend\r\n") and text


def test_a_place_has_a_beginning_and_an_end(tmp_path):
    assert report.place_of("x").search(b"<!-- x -->\n<!-- /x -->")
    for page in (b"<!-- x -->\n", b"<!-- /x -->\n<!-- x -->\n", b"<!-- y -->\n<!-- /y -->", b"<!-- x --> <!-- /x -->"):
        assert not report.place_of("x").search(page)


def test_a_record_is_whole_where_every_table_can_be_made_of_it():
    whole = record(3.0, 2.0, 1.0)
    assert tables.is_whole(whole)
    values, keys = (None, "x", -1.5, [], {}, [1], ["a", "b", "c"]), ("train_length", "lengths", "loss")
    odd = [whole | {key: value} for key in keys for value in values]
    odd += [{name: whole[name] for name in whole if name != key} for key in whole]
    for other in (*odd, [], {}, None):
        assert not tables.is_whole(other), other


def test_a_folder_of_a_killed_call_is_ours_and_one_of_other_pages_is_not(tmp_path):
    (tmp_path / "length.png").touch()
    with pytest.raises(ValueError, match="other files"):
        tables.check_folder(tmp_path)
    report.write_table(tmp_path / "results.md", "evaluate", ["| a |"], "python evaluate.py", CPU)
    tables.check_folder(tmp_path)
