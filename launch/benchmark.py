"""Times LRSA attention against torch's dense attention on one GPU, in one run, and appends rows to a CSV file.

    python launch/benchmark.py --num-tokens 32768 131072 --retention 0.125 0.25

Every row has the median, 20th and 80th percentile of the repetitions; selection and gather are part of LRSA's times.
Absolute times say little without the dense rows beside them: compare within one run.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from lrsa_ds import LRSAConfig, lrsa_attention, select_kept  # noqa: E402

DENSE = {"dense cuDNN": SDPBackend.CUDNN_ATTENTION, "dense flash": SDPBackend.FLASH_ATTENTION}
BASELINE = "dense cuDNN"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--retention", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--sink-size", type=int, default=16)
    parser.add_argument("--lag-size", type=int, default=1024)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("QUERY", "KV", "DIM"))
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--csv", type=Path, default=Path("outputs/benchmark.csv"))
    return parser.parse_args()


def setting() -> dict[str, str]:
    """What a time depends on besides the code that is timed."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or "unknown",
    }


def measure(function: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Milliseconds of a call on the GPU (20th, 50th, 80th percentile), and the memory it took beyond its inputs."""
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    return {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "peak_gb": peak, "first_call_s": first}


def dense(backend: SDPBackend) -> Callable:
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def benchmark(options: argparse.Namespace, num_tokens: int) -> list[dict]:
    """Rows of one sequence length: each method, forward, and forward with backward."""
    num_heads, num_kv_heads, dim = options.heads
    q, k, v, upstream = (
        torch.randn(1, heads, num_tokens, dim, device="cuda", dtype=torch.bfloat16)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    methods = [(name, None, dense(backend)) for name, backend in DENSE.items()]
    for retention in options.retention:
        config = LRSAConfig(sink_size=options.sink_size, lag_size=options.lag_size, retention=retention, backend="flex")
        methods.append(("LRSA flex", config, lambda q, k, v, config=config: lrsa_attention(q, k, v, config)))
    rows = []

    def add(method: str, config: LRSAConfig | None, passes: str, function: Callable) -> None:
        kept = config.num_kept if config else ""
        row = {"num_tokens": num_tokens, "method": method, "num_kept": kept, "passes": passes}
        rows.append(row | measure(function, options.repetitions))
        print_row(rows)

    for name, config, attend in methods:
        with torch.no_grad():
            add(name, config, "forward", lambda attend=attend: attend(*inputs))

        def both(attend=attend):
            return torch.autograd.grad(attend(*inputs), inputs, upstream)

        add(name, config, "forward+backward", both)
        if config:
            add(name, config, "selection", lambda config=config: select_kept(k, v, config))
    return rows


def print_row(rows: list[dict]) -> None:
    row = rows[-1]
    same = [r for r in rows if r["method"] == BASELINE and r["passes"] == row["passes"]]
    speedup = f"{same[0]['ms_p50'] / row['ms_p50']:.2f}x" if same else ""
    print(
        f"{row['num_tokens']:>9,} {row['method']:<12} {row['num_kept']!s:>5} {row['passes']:<17}"
        f"{row['ms_p20']:9.2f} {row['ms_p50']:9.2f} {row['ms_p80']:9.2f} {row['peak_gb']:8.2f} {speedup:>9}",
        flush=True,
    )


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
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA device, and there is none.", file=sys.stderr)
        return 2
    where = setting()
    heads = dict(zip(("num_heads", "num_kv_heads", "head_dim"), options.heads, strict=True))
    sizes = {"sink_size": options.sink_size, "lag_size": options.lag_size}
    print(", ".join(f"{key} {value}" for key, value in (where | heads | sizes | {"dtype": "bf16"}).items()))
    columns = f"{'tokens':>9} {'method':<12} {'K':>5} {'passes':<17}{'ms p20':>9} {'p50':>9} {'p80':>9} {'peak GB':>8}"
    print(f"{columns} {'speed-up':>9}  (p50, against {BASELINE})")
    torch.manual_seed(0)
    for num_tokens in options.num_tokens:
        rows = benchmark(options, num_tokens)
        append(options.csv, [where | heads | sizes | row for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
