"""DeepSpeed, imported without a library that costs more than itself; nothing that only infers imports it."""

import sys
from types import ModuleType
from typing import cast

# DeepSpeed's autotuner, which no run uses, imports MLflow wherever it is installed: 1.4 s of every process. None in its
# place says that it is not installed. `lrsa_ds.logs` imports it where a run logs to it.
_modules = cast("dict[str, ModuleType | None]", sys.modules)
_mlflow = _modules.setdefault("mlflow", None)
import deepspeed as deepspeed  # noqa: E402

if _mlflow is None:
    del _modules["mlflow"]
