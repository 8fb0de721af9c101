"""Ranks as launchers say them: the variables of each, set by hand."""

import pytest

from minitune.errors import InputError
from minitune.launch.ranks import Launched, first_node, launched

pytestmark = pytest.mark.fast

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "6105"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[003-004,7],cpu1",
}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        pytest.param({}, Launched(), id="alone"),
        pytest.param(TORCHRUN, Launched(5, 8, 1, "node0", 6105), id="torchrun"),
        pytest.param(
            {**TORCHRUN, "NODE_RANK": "1", "AZUREML_RUN_ID": "run", **OPEN_MPI},
            Launched(5, 8, 1, "node0", 6105),
            id="Azure ML, distribution pytorch",
        ),
        pytest.param(
            {**OPEN_MPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            Launched(5, 8, 1, "10.0.0.4", 6000),
            id="Azure ML, distribution mpi",
        ),
        pytest.param(
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, Launched(5, 8, 1, "127.0.0.1", 29500), id="mpirun on one node"
        ),
        pytest.param(
            {**OPEN_MPI, "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}, Launched(5, 8, 1, "node0", 1234), id="mpirun, told"
        ),
        pytest.param(SRUN, Launched(5, 8, 1, "gpu003", 15000 + 123456 % 20000), id="srun"),
        pytest.param(
            {**SRUN, "SLURM_GPUS_PER_TASK": "h100:1"}, Launched(5, 8, 1, "gpu003", 18456, 1), id="srun that binds a GPU to each"
        ),
        pytest.param({**SRUN, "SLURM_STEP_NODELIST": "gpu7"}, Launched(5, 8, 1, "gpu7", 18456), id="srun on some nodes"),
        pytest.param({name: SRUN[name] for name in SRUN if name != "SLURM_STEP_ID"}, Launched(), id="script of sbatch"),
        pytest.param({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Launched(), id="srun of one"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, Launched(), id="torchrun of one"),
        pytest.param({"RANK": "7"}, Launched(), id="a RANK that no launcher set"),
        pytest.param({"PMI_SIZE": "1"}, Launched(), id="mpiexec of one"),
    ],
)
def test_each_launcher_says_the_rank_in_its_own_words(variables: dict[str, str], place: Launched):
    assert launched(variables) == place


def test_variables_for_torch_say_the_same_place():
    place = Launched(5, 8, 1, "node0", 6105)
    assert launched(place.variables()) == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "8"}, r"launch: WORLD_SIZE is set without RANK, expected a number .* unset both"),
        ({"RANK": "one", "WORLD_SIZE": "8"}, r"launch: RANK is 'one', expected a number from 0 on"),
        ({"RANK": "8", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, r"this is rank 8 of 8 processes, expected"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            r"without MASTER_ADDR and MASTER_PORT, expected both; .* torchrun or --ranks",
        ),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, r"launch: MASTER_PORT gives the port '99999', expected a number from 1 to 65535"),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            r"8 processes on several nodes, .* expected MASTER_ADDR",
        ),
        ({**OPEN_MPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4:x"}, r"10.0.0.4:x gives the port 'x', expected a number"),
        ({**SRUN, "SLURM_JOB_NODELIST": ""}, r"srun has started 8 processes, and neither SLURM_STEP_NODELIST nor"),
        ({"PMI_SIZE": "4"}, r"launch: PMI_SIZE is 4, which mpiexec sets, expected a launcher whose variables say the rank"),
    ],
)
def test_variables_that_say_too_little_are_refused(variables: dict[str, str], message: str):
    with pytest.raises(InputError, match=message):
        launched(variables)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-004,7]", "gpu003"),
        ("a,b", "a"),
        ("node7", "node7"),
        ("rack[1-2]n[01-03],x", "rack1n01"),
        ("g[9,11-12]-ib", "g9-ib"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str):
    assert first_node(nodes) == first
