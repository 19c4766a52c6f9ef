"""Who may start ranks, read off the variables that each starter sets; only torchrun and deepspeed are installed here.

The variables of srun, sbatch and mpirun are written down from their documentation: none of them runs in these tests.
"""

import pytest

from lrsa_ds.errors import LRSAError
from lrsa_ds.process.launcher import check_launcher, is_one_of_several

RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
# A job with two tasks: the batch script itself is one process, whatever its allocation is.
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = SBATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "2", "PMI_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "host", "MASTER_PORT": "29500"},
        RANK,
        RANK | {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"},
        SBATCH,
        SBATCH | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"},
        SRUN | RANK,
        OPEN_MPI | RANK,
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_process_and_ranks_that_know_their_place_may_start(environment):
    check_launcher(environment)


@pytest.mark.parametrize(
    "environment,said",
    [
        (SRUN, "srun has started 2 processes"),
        (OPEN_MPI, "mpirun of Open MPI has started 4 processes"),
        ({"PMI_SIZE": "3", "PMI_RANK": "2"}, "mpirun of MPICH or Intel MPI has started 3 processes"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"),
        ({k: v for k, v in RANK.items() if k != "MASTER_PORT"}, "MASTER_PORT is not: a rank needs all of them"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK, LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "for a run of one process unset LOCAL_RANK"),
        (OPEN_MPI | {"RANK": "0"}, "RANK is set and WORLD_SIZE"),
        (RANK | {"RANK": "2"}, "RANK='2' in the environment is not valid: give a whole number from 0 to 1"),
        (RANK | {"RANK": "one"}, "RANK='one'"),
        (RANK | {"RANK": ""}, "RANK=''"),
        (RANK | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (RANK | {"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        (RANK | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (RANK | {"MASTER_PORT": "70000"}, "from 1 to 65535"),
    ],
)
def test_others_are_refused_by_name(environment, said):
    with pytest.raises(LRSAError) as caught:
        check_launcher(environment)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_has_others_beside_it():
    assert is_one_of_several(RANK) and is_one_of_several(SRUN)
    assert not is_one_of_several(RANK | {"WORLD_SIZE": "1"})
    assert not is_one_of_several({}) and not is_one_of_several(SBATCH)
