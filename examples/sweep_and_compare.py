"""Trains with several retentions and with dense attention, and compares: `python examples/sweep_and_compare.py`.

A random model of two layers stands for yours, so the scores mean nothing; the commands are those of a real study. Give
settings to change it: `python examples/sweep_and_compare.py +recipe=qa_smollm2`.
"""

import argparse
import subprocess
import sys
from pathlib import Path


def run(*words: str) -> None:
    print(f"\n$ python -m lrsa_ds {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "lrsa_ds", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value for every run")
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep_and_compare"), help="a new directory")
    options = parser.parse_args()
    settings = options.settings or [
        "+recipe=smoke", "optim.num_steps=2", "eval.num_examples=2", "eval.before=false", "checkpoint.export=false",
    ]  # fmt: skip
    settings += ["eval.retentions=[1.0,0.25]", "log.wandb=disabled"]
    # The jobs of a sweep get a directory each, and a table (sweep.txt) and a picture (sweep.png) of all.
    run("sweep", "--multirun", *settings, "attention.retention=0.25,0.5", f"output_dir={options.output / 'sweep'}")
    # The baseline: the same training without LRSA, evaluated under the same caches.
    run("train", *settings, "attention=dense", f"output_dir={options.output / 'dense'}")
    # Question by question, with 95 % intervals; several seeds of each are separated by commas.
    groups = [f"dense={options.output / 'dense'}"]
    groups += [f"lrsa_{name}={options.output / 'sweep' / f'retention-{name}'}" for name in ("0.25", "0.5")]
    run("compare", *groups, "--output", str(options.output / "comparison"))


if __name__ == "__main__":
    main()
