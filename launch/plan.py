"""What a run will take on GPUs that need not be here: `python launch/plan.py +recipe=qa_128k gpu=h100 gpus=8`.

    python launch/plan.py model=hub model.name=Qwen/Qwen2.5-7B-Instruct seq_len=262144 gpu='{memory_gb: 48}' gpus=4

Takes what launch/train.py takes, and checks it, without reading data or weights. Prints memory, bytes sent, operations
and time of a step, the longest sequence that fits, and the same for other SP sizes and levers. Its own keys: gpu, gpus,
gpus_per_node, network_gb_s, host_memory_gb, num_targets, compare (lrsa_ds/costs/settings.py, docs/memory.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import launch.cli.interrupts
import launch.cli.no_gc  # noqa: F401
from launch.cli.command import leave, run_command
from lrsa_ds.costs.measured import compared
from lrsa_ds.costs.report import describe, no_fit_sentence, recommendation, table
from lrsa_ds.costs.settings import PlanConfig
from lrsa_ds.errors import require
from lrsa_ds.train.forecast import forecast, job_and_sizes


def action(config: PlanConfig) -> bool:
    """Prints the plan, or with `compare` what was measured beside it.

    Raises:
        LRSAError: no settings fit.
    """
    if config.compare is not None:
        job, sizes, *_ = job_and_sizes(config, config.machine, config.itemsize, config.num_targets)
        print("\n".join(compared(Path(config.compare), config, job, sizes, config.machine)), flush=True)
        return True
    found = forecast(config, config.machine, config.itemsize, config.num_targets)
    lines = [*describe(found.sizes, found.chosen, found.machine), "", *table(found.others)]
    print("\n".join([*lines, "", recommendation(found.best, found.chosen)]).rstrip(), flush=True)
    require(found.best is not None, no_fit_sentence(found.others, found.chosen.job, found.machine))
    return True


if __name__ == "__main__":
    # The schema knows the keys of a plan too, so what is composed is conf/train.yaml.
    leave(run_command(action, "train", PlanConfig, on_gpu=True))
