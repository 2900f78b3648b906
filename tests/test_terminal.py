"""Progress as plain lines if there is no terminal."""

from mc2_hpc.terminal import progress


def test_lines_show_stage_and_end(capsys):
    with progress() as report:
        report("match", 1, 3, "a")  # the first is shown
        report("match", 2, 3, "b")  # too soon after it
        report("match", 3, 3, "c")  # the last is shown
        report("images", 64, 0, "")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["match: 1/3", "match: 3/3", "images: 64"]
    assert "ETA 0 s" in lines[1] and "ETA" not in lines[2]
