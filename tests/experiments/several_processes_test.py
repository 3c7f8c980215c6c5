"""The flags of several processes, none of which is started."""

import pytest
from absl import flags

from experiments import several_processes
from meta_jax.lookup import UsageError


@pytest.mark.parametrize(
    ("given", "culprit"),
    [
        (["--num_processes=2"], "--num_processes is of no use alone: add --distributed"),
        (["--process_id=0"], "--process_id is of no use alone"),
        (["--distributed", "--coordinator_address=here"], "=here must be HOST:PORT"),
        (["--distributed", "--coordinator_address=:80"], "=:80 must be HOST:PORT"),
        (["--distributed", "--num_processes=2", "--process_id=2"], "=2 must be below --num_proc"),
        (["--distributed"], "--distributed: .* or give --coordinator_address=HOST:PORT, --num"),
    ],
)
def test_flags_that_start_no_processes_are_refused_in_a_line(given, culprit, monkeypatch):
    for scheduler in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(scheduler, raising=False)
    values = flags.FlagValues()
    several_processes.define_flags(values)
    values(["", *given])
    with pytest.raises(UsageError, match=culprit) as refused:
        several_processes.join(values)
    assert "\n" not in str(refused.value)


def test_one_process_joins_nobody():
    values = flags.FlagValues()
    several_processes.join(values)
    several_processes.define_flags(values)
    values([""])
    several_processes.join(values)
