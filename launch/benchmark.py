"""Times LRSA against dense attention, both in one run, and appends rows to a CSV file.

    python launch/benchmark.py attention --num-tokens 32768 131072 --retention 0.25 0.125      # needs a GPU
    python launch/benchmark.py generation --num-tokens 32768 131072 --retention 0.25 0.125
    python launch/benchmark.py decoding --num-tokens 8192 131072 --streams 1 8 --retention 0.125

`attention`: forward, and forward with backward, against torch's dense kernels, and against flash-attn-4 and
native-sparse-attention-pytorch (NSA) if they are installed. LRSA's times include selection and gather; NSA's do not
include the choice of blocks. `generation`: prefilling, decoding and the memory of the cache, against the dense cache of
transformers; with `--compile`, which is of `lrsa_ds.prefill`, also against the dense cache that it fills ("dense too").
Several caches decode in turn, token by token. `gpu_ms` is the time that the GPU works for a token; it is less than the
elapsed time if the host cannot keep the GPU busy. "replay" is the same token from a CUDA graph, without the host.
`decoding`: the time from token to token as a streamer of `lrsa_ds.generate` sees it, with the dense cache under the
same function and under transformers' `generate`, after caches of random keys and values. Every row has the median, 20th
and 80th percentile of the repetitions. Absolute times mean little without the dense rows: compare within one run.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.attention_methods import dense_methods, has_nsa, nsa  # noqa: E402
from benchmarks.generation import SHAPES, decoding_rows, generation_rows, settings_of  # noqa: E402
from benchmarks.timing import measure  # noqa: E402
from lrsa_ds import LRSAConfig, lrsa_attention  # noqa: E402
from lrsa_ds.attention.buffered import buffered_layout, select_and_gather  # noqa: E402
from lrsa_ds.attention.kernels.kernel import choose_kernel  # noqa: E402
from lrsa_ds.attention.partition import partition_table  # noqa: E402
from lrsa_ds.errors import LRSAError, require_one_of  # noqa: E402
from lrsa_ds.models.inference import MAX_TOKENS_AT_ONCE  # noqa: E402
from lrsa_ds.registry import KERNELS  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=ROWS)
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--retention", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--sink-size", type=int, default=16)
    parser.add_argument("--lag-size", type=int, default=1024)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("QUERY", "KV", "DIM"))
    parser.add_argument("--methods", nargs="+", default=[], help="of attention: the names to time; default: all")
    parser.add_argument("--chunks-at-once", type=int, help="of prefilling; default: as many as --max-tokens-at-once")
    parser.add_argument("--max-tokens-at-once", type=int, default=MAX_TOKENS_AT_ONCE, help="of prefilling")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="of decoding: rows of a batch")
    parser.add_argument("--prefill-only", action="store_true", help="of generation: no decoding")
    parser.add_argument(
        "--dense-attention", default="sdpa", help="of prefilling, as transformers names it, such as flash_attention_4"
    )
    parser.add_argument("--liger", action="store_true", help="of generation and decoding: Liger's kernels in the model")
    parser.add_argument("--compile", action="store_true", help="of prefilling and decoding: compile=True")
    parser.add_argument(
        "--compiled", action="store_true", help="of decoding: also transformers' static cache, compiled (minutes)"
    )
    parser.add_argument("--model", choices=SHAPES, default="1.5b", help="of generation and decoding; random weights")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--csv", type=Path, default=Path("outputs/benchmark.csv"))
    return parser.parse_args()


def setting(device: torch.device) -> dict[str, str]:
    """The circumstances that a time depends on, besides the code."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def fast_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Names of the kernels to time: not the readable ones, and only those that this GPU can run."""
    fast = [name for name in KERNELS if not KERNELS[name].is_readable]
    cannot = [name for name in fast if KERNELS[name].runs_on(device) and KERNELS[name].why_not(device, dtype, head_dim)]
    return [name for name in fast if name not in cannot]


def attention_methods(options: argparse.Namespace, num_tokens: int, device: torch.device) -> list[tuple]:
    """Name, settings of LRSA if any, and function of everything that is timed."""
    dense = dense_methods(device, torch.bfloat16, options.heads[2])
    methods: list[tuple[str, LRSAConfig | None, Callable]] = [(name, None, attend) for name, attend in dense.items()]
    for config in (settings_of(options, retention) for retention in options.retention):
        for backend in fast_kernels(device, torch.bfloat16, options.heads[2]):
            chosen = replace(config, backend=backend)
            methods.append((f"LRSA {backend}", chosen, lambda q, k, v, c=chosen: lrsa_attention(q, k, v, c)))
        if has_nsa():
            methods.append(("NSA", config, nsa(partition_table((num_tokens,), config))))
    names = list(dict.fromkeys(name for name, _, _ in methods))
    for name in options.methods:
        require_one_of("--methods", name, tuple(names))
    return [method for method in methods if not options.methods or method[0] in options.methods]


def attention_rows(options: argparse.Namespace, num_tokens: int, device: torch.device, add: Callable) -> None:
    """Rows of one sequence length: each method, forward, and forward with backward."""
    num_heads, num_kv_heads, dim = options.heads
    q, k, v, upstream = (
        torch.randn(1, heads, num_tokens, dim, device=device, dtype=torch.bfloat16)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for name, config, attend in attention_methods(options, num_tokens, device):
        with torch.no_grad():
            forward = measure(lambda attend=attend: attend(*inputs), options.repetitions, device)
        add(name, config, "forward", forward)

        def both(attend=attend):
            return torch.autograd.grad(attend(*inputs), inputs, upstream)

        add(name, config, "forward+backward", measure(both, options.repetitions, device))
    for config in (settings_of(options, retention) for retention in options.retention):
        kernel = choose_kernel(config, device, k.dtype, dim)
        layout = buffered_layout((num_tokens,), config, device, kernel.skips_queries_ahead)
        with torch.no_grad():
            selection = measure(lambda layout=layout: select_and_gather(k, v, layout), options.repetitions, device)
        add("LRSA", config, "select and gather", selection)


ROWS = {"attention": attention_rows, "generation": generation_rows, "decoding": decoding_rows}
COLUMNS = ["ms_p20", "ms_p50", "ms_p80", "gpu_ms", "peak_gb", "cache_gb", "first_call_s"]


class Table:
    """Prints rows when they are added, with the speed-up over the first dense method of the same length and pass."""

    def __init__(self):
        self.rows: list[dict] = []
        title = f"{'tokens':>9} {'method':<12} {'K':>5} {'what':<27}"
        print(
            title
            + "".join(f"{name:>10}" for name in ("ms p20", "p50", "p80", "GPU ms", "peak GB", "cache GB", "speed-up"))
        )

    def add(self, num_tokens: int, method: str, config: LRSAConfig | None, what: str, values: dict) -> None:
        row = {"num_tokens": num_tokens, "method": method, "num_kept": config.num_kept if config else "", "what": what}
        self.rows.append(row | {name: values.get(name, "") for name in COLUMNS})
        row = self.rows[-1]
        same = [r for r in self.rows if (r["num_tokens"], r["what"]) == (num_tokens, what) and not r["num_kept"]]
        speedup = f"{same[0]['ms_p50'] / row['ms_p50']:.2f}x" if same else ""
        cells = [row[name] for name in COLUMNS[:-1]]
        numbers = "".join(f"{'' if cell == '' else f'{cell:.2f}':>10}" for cell in cells)
        print(f"{num_tokens:>9,} {method:<12} {row['num_kept']!s:>5} {what:<27}{numbers}{speedup:>10}", flush=True)


def append(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.what == "attention" and device.type == "cpu":
        print("error: the benchmark of attention needs a CUDA device, and there is none.", file=sys.stderr)
        return 2
    where = setting(device)
    subject = "heads" if options.what == "attention" else "model"
    shape = {subject: str(getattr(options, subject))}
    sizes = {"sink_size": options.sink_size, "lag_size": options.lag_size}
    print(", ".join(f"{key} {value}" for key, value in (where | shape | sizes).items()))
    torch.manual_seed(0)
    table = Table()
    measure_rows = ROWS[options.what]
    for num_tokens in options.num_tokens:
        before = len(table.rows)
        measure_rows(options, num_tokens, device, lambda *row, n=num_tokens: table.add(n, *row))
        append(options.csv, [where | shape | sizes | row for row in table.rows[before:]])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LRSAError as error:
        sys.exit(f"error: {error}")
