"""Published benchmarks, read from the user's copies, with their prompts, limits and metrics: scores are comparable."""

from recipes.benchmarks import longbench, ruler
from recipes.benchmarks.benchmark import Benchmark, Metric

# By the key of the configuration that holds the path, which is also the name of the task.
BENCHMARKS: dict[str, Benchmark] = {
    longbench.KEY: longbench.LONGBENCH,
    ruler.KEY: ruler.RULER,
}
METRICS: dict[str, Metric] = {
    name: metric for benchmark in BENCHMARKS.values() for name, metric in benchmark.metrics.items()
}
