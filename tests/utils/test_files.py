"""Files that others read."""

import json

from calm.utils.files import write_json


def test_json_has_a_list_of_numbers_in_a_line_and_reads_back_the_same(tmp_path):
    document = {
        "blocks": [[1.5, -2, None], [3, 4e-9, True]],
        "texts": ["a [\n 1,\n 2\n] b", '"[', "]"],
        "empty": [],
        "models": [{"n": [1]}, {"[\n1\n]": 0}],
    }
    write_json(tmp_path / "a.json", document)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == document
    assert "  [ 1.5, -2, null ],\n  [ 3, 4e-09, true ]\n" in text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
