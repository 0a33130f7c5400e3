import json

from sailvl import log


def test_rows_come_back_in_order_and_not_finite_values_become_null(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with log.MetricsLog(path) as metrics:
        metrics.write(step=1, loss=2.5, event="go")
        metrics.write(step=2, loss=float("nan"), grad_norm=float("inf"))
    assert log.read(path) == [{"step": 1, "loss": 2.5, "event": "go"}, {"step": 2, "loss": None, "grad_norm": None}]


def test_a_line_is_on_disk_before_close(tmp_path):
    metrics = log.MetricsLog(tmp_path / "metrics.jsonl")
    metrics.write(step=1)
    assert log.read(tmp_path / "metrics.jsonl") == [{"step": 1}]
    metrics.close()
    metrics.close()


def test_a_torn_last_line_is_dropped_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert log.read(path) == [{"step": 1}]
    with log.MetricsLog(path) as metrics:
        metrics.write(step=2)
    assert log.read(path) == [{"step": 1}, {"step": 2}]


def test_a_line_torn_inside_a_character_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "note": "' + "狗".encode()[:2])
    assert log.read(path) == [{"step": 1}]


def test_truncation_drops_later_steps_and_writing_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with log.MetricsLog(path) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write(step=step)
        metrics.truncate_after(2)
        metrics.write(step=3, again=True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "again": True},
    ]  # fmt: skip


def test_no_file_reads_as_no_rows(tmp_path):
    assert log.read(tmp_path / "nothing.jsonl") == []
