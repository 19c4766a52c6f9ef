"""Post-training with LRSA: `deepspeed launch/train.py +recipe=qa_128k [key=value ...]`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `recipes` and `lrsa_ds` of this checkout, installed or not

import hydra  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

import recipes  # noqa: E402
from launch.accelerator import PICKS, register_resolver  # noqa: E402
from launch.sentences import hydra_sentence  # noqa: E402
from lrsa_ds.config import typed_config  # noqa: E402
from lrsa_ds.errors import LRSAError  # noqa: E402
from lrsa_ds.parallel.mesh import local_rank  # noqa: E402
from lrsa_ds.run import train  # noqa: E402


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def run(composed: DictConfig) -> None:
    config = typed_config(composed)
    train(config, recipes.load_procedure(config.procedure), list(PICKS.values()))


def main() -> int:
    # The deepspeed launcher appends --local_rank=N, which Hydra would refuse; the environment says the same.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, and leave as one sentence
    register_resolver()
    try:
        run()
    except (LRSAError, HydraException, OmegaConfBaseException) as error:
        if local_rank() == 0:
            print(f"error: {hydra_sentence(error)}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
