"""The alarm of the benchmark."""

import json

import pytest
from absl import flags

from experiments import ledger
from experiments.benchmark import alarm
from meta_jax.lookup import UsageError

PUBLISHED = ledger.ROOT / "results" / "benchmark_cpu.json"


def row(work, share, ratio=None):
    peers = None if ratio is None else {"median": ratio}
    return {"work": work, "share_of_ceiling": {"median": share}, "ratio_to_fastest_peer": peers}


def test_a_step_is_compared_beside_peers_where_they_ran_both_times():
    before = [row("maml", 0.5, ratio=3.0), row("reptile", 0.6), row("gone", 0.1)]
    now = [row("maml", 0.5, ratio=1.5), row("reptile", 0.4, ratio=9.0), row("new", 0.1)]
    found = alarm.growths(before, now)
    assert found == {"maml": pytest.approx(2.0), "reptile": pytest.approx(1.5)}


def test_only_what_became_slower_is_an_alarm(tmp_path, capsys, monkeypatch):
    slower = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    slower["rows"][0]["ratio_to_fastest_peer"]["median"] /= 1.6
    path = tmp_path / "slower.json"
    path.write_text(json.dumps(slower))
    files = {"before": str(PUBLISHED), "now": str(path), "most": 1.5}

    def run(**changes):
        values = flags.FlagValues()
        alarm.define_flags(values)
        given = files | changes
        values(["alarm", *(f"--{name}={value}" for name, value in given.items())])
        monkeypatch.setattr(alarm, "FLAGS", values)
        alarm.main([])

    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "maml_second_order_1step: 160% of the relative time before, more than 150%"
    assert all(line.endswith("100% of the relative time before") for line in lines[1:])
    run(now=str(PUBLISHED))
    assert "more than" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_file_that_is_none_of_the_benchmark_is_named(tmp_path, content):
    path = tmp_path / "figures.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"figures\.json is no file of experiments\.benchmark"):
        alarm.read_rows(str(path))


def test_files_without_a_common_step_are_refused():
    with pytest.raises(UsageError, match="no training step in common"):
        alarm.growths([row("maml", 0.5)], [row("reptile", 0.5)])
