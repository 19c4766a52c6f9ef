"""The LM evaluation harness with the model class `lrsa`: `python launch/harness.py --model lrsa --model_args ...`.

    python launch/harness.py --model lrsa --model_args pretrained=outputs/.../model,retention=0.125 --tasks hellaswag

Everything else is as for `lm_eval`, whose command knows only the model classes that it comes with.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

from lrsa_ds.errors import LRSAError


def main() -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"error: the harness is not installed ({error}): pip install 'lrsa-ds[lm-eval]'.", file=sys.stderr)
        return 2
    import lrsa_ds.evaluate.harness  # noqa: F401  registers the model class

    try:
        cli_evaluate()
    except LRSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
