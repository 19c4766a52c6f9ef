"""The commands as users type them: real processes under the deepspeed launcher, and what they leave behind."""

import json
import math
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.config import typed_config
from lrsa_ds.evaluate.results import read_results
from lrsa_ds.logs.report import evaluation_table
from lrsa_ds.process.signals import SIGNALS
from tests.dist.launcher import launch, rows_of, run, run_alone, run_as_ranks, train_alone
from tests.helpers import ROOT, wandb_history, wandb_records

pytestmark = pytest.mark.dist

ALONE = (
    "import runpy, sys; sys.argv = ['launch/train.py', *sys.argv[1:]]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
SHORT = ["optim.num_steps=2", "optim.warmup_steps=1", "eval.before=false", "eval.after=false", "log.wandb=disabled"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke recipe in two processes, as the README has it."""
    output = tmp_path_factory.mktemp("smoke") / "run"
    followed = ["log.wandb=offline", "log.tensorboard=true", "log.mlflow=true", "log.peak_tflops=0.5"]
    done = launch("+recipe=smoke", f"output_dir={output}", *followed)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def test_smoke_leaves_a_whole_run(smoke):
    output, done = smoke
    assert (output / "COMPLETED").exists()
    assert not (output / "ranks").exists()  # where the watch keeps its files
    steps = rows_of(output, "train")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    names = ["loss", "grad_norm", "lr", "num_tokens", "num_target_tokens"]
    names += ["tokens_per_second", "step_seconds", "peak_memory_gb", "host_memory_gb", "mfu"]
    names += ["data_seconds", "wait_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"]
    assert all(row[name] > 0 for row in steps for name in names)
    assert all(0 < row["tflops_executed"] < row["tflops_dense"] for row in steps)
    assert all(row["mfu"] == pytest.approx(row["tflops_executed"] / 0.5) for row in steps)
    assert list((output / "tensorboard").iterdir()) and (output / "mlflow" / "mlflow.db").exists()
    assert " MFU " in done.stderr and " TFLOPS " in done.stderr and " host " in done.stderr
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(3 < row["cache_factor"] < 4 and row["num_short_tokens"] == 0 for row in steps)
    assert "cache: after 1,024 tokens it holds 240 entries at retention 1/8 (23.4 %, 4.27x smaller)" in done.stdout
    (data,) = rows_of(output, "data")
    long = f"has {data['answer_length_p90']:,} tokens or more (the longest {data['answer_length_max']:,})"
    assert data["answer_length_p90"] >= 32  # passkeys, in bytes
    assert f"warning: one answer in ten {long}, and retention * lag_size keeps 8 of the tokens" in done.stdout
    assert rows_of(output, "summary") == [{"kind": "summary", "step": 6, "short_token_share": 0.0}]
    evaluations = rows_of(output, "eval")
    assert {row["when"] for row in evaluations} == {"before", "after"}
    assert {row["retention"] for row in evaluations} == {1.0, 0.5, 0.25, 0.125}
    table = evaluation_table(evaluations)
    assert (output / "evaluation.txt").read_text() == table + "\n"
    assert table in done.stdout
    assert (output / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 2 * 4 * 3 * 3  # times, retentions, tasks, examples
    assert {row["exact"] for row in predictions} <= {True, False}
    assert all(row["answer"].endswith("<|im_end|>") and row["prompt"] for row in predictions)
    config = typed_config(OmegaConf.load(output / "config.yaml"))
    assert config.run_name == "smoke-lrsa-0.125-1024" and config.output_dir == str(output)


def test_smoke_shows_its_progress(smoke):
    _, done = smoke
    assert "step 6/6" in done.stderr and "tokens/s" in done.stderr and "left" in done.stderr
    assert done.stderr.count("evaluation (before): answer 48/48") == 1  # on rank 0 alone
    assert "of the run" in done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line[:5] in ("Seen:", "Trust", "Next:")] == [
        "Seen", "Trust", "Next",
    ]  # fmt: skip


def test_the_exported_model_is_a_hugging_face_model_that_knows_its_settings(smoke):
    output, _ = smoke
    model = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    # Whoever may read what a run writes may read its weights too.
    assert {path.stat().st_mode for path in (output / "model").iterdir()} == {(output / "config.yaml").stat().st_mode}
    assert model.config.lrsa == {"sink_size": 16, "lag_size": 64, "retention": 0.125, "backend": "auto"}
    ids = torch.tensor([tokenizer("What is the pass key? " * 10).input_ids])
    assert model(ids).logits.isfinite().all()
    apply_lrsa(model, LRSAConfig(**model.config.lrsa))
    assert model(ids, use_cache=False).logits.isfinite().all()


def test_the_offline_run_of_wandb_holds_the_same(smoke):
    output, done = smoke
    records = wandb_records(output)
    (run_record,) = (record.run for record in records if record.HasField("run"))
    assert run_record.display_name == "smoke-lrsa-0.125-1024"
    config = {item.key: json.loads(item.value_json) for item in run_record.config.update}
    assert config["attention"]["lag_size"] == 64
    assert config["run"] == {key: value for key, value in rows_of(output, "start")[0].items() if key != "kind"}
    assert config["run"]["world_size"] == 2 and config["run"]["num_parameters"] > 50_000
    summary = [item for record in records if record.HasField("summary") for item in record.summary.update]
    assert "short_token_share" in {item.key or item.nested_key[0] for item in summary}
    logged = [row for row in wandb_history(records) if "train/loss" in row]
    assert [row["train/loss"] for row in logged] == [row["loss"] for row in rows_of(output, "train")]
    last = wandb_history(records)[-1]
    files = next(output.glob("wandb/offline-run-*")) / "files"
    assert len(json.loads((files / last["evaluation/path"]).read_text())["data"]) == len(rows_of(output, "eval"))
    assert (files / last["evaluation_picture/path"]).read_bytes() == (output / "evaluation.png").read_bytes()
    assert "wandb sync" in done.stdout


def test_a_finished_run_is_kept(smoke):
    output, _ = smoke
    before = (output / "COMPLETED").read_text()
    done = train_alone("+recipe=smoke", f"output_dir={output}")
    assert done.returncode == 2
    assert "holds a finished run" in done.stderr and "checkpoint.overwrite=true" in done.stderr
    assert (output / "COMPLETED").read_text() == before


def test_sequence_parallelism_and_memory_levers_change_nothing_but_the_speed(smoke, tmp_path):
    """The same sequences in the same order, the same losses and the same evaluation, before and after."""
    output, _ = smoke
    done = run_as_ranks(
        *["+recipe=smoke", "parallel.sp_size=2", "optim.grad_accum=2", "log.wandb=disabled"],
        *[f"output_dir={tmp_path}/run", "checkpoint.export=false", "memory=long", "memory.tile_size=200"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks to a sequence" in done.stdout
    assert "memory: checkpointed activations in host memory, MLPs in 3 tiles" in done.stdout
    assert done.stdout.count("mfu is left out: the peak of CPU is not known") == 1
    assert all("mfu" not in row and row["tflops_executed"] > 0 for row in rows_of(tmp_path / "run", "train"))
    for shared, alone in zip(rows_of(tmp_path / "run", "train"), rows_of(output, "train"), strict=True):
        for name in ("step", "num_tokens", "num_target_tokens", "lr", "retention"):
            assert shared[name] == alone[name], name
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert 0 < shared["sent_bytes_forward"] < shared["ulysses_bytes_forward"]
    for shared, alone in zip(rows_of(tmp_path / "run", "eval"), rows_of(output, "eval"), strict=True):
        assert shared["nll"] == pytest.approx(alone["nll"], rel=1e-5)
        for name in ("when", "task", "retention", "exact_match", "token_accuracy", "num_examples"):
            assert shared[name] == alone[name], name


def test_selftest():
    done = run_as_ranks("+recipe=smoke", "parallel.sp_size=2", script="selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: the differences are within 1e-05" in done.stdout


def test_the_same_seed_gives_the_same_result(tmp_path):
    rows = []
    for name in ("first", "second"):
        output = tmp_path / name
        done = train_alone("+recipe=smoke", *SHORT, f"output_dir={output}", "checkpoint.export=false")
        assert done.returncode == 0, done.stderr
        rows.append([(row["loss"], row["grad_norm"]) for row in rows_of(output, "train")])
    assert rows[0] == rows[1]


def test_your_own_file(tmp_path):
    data = tmp_path / "rows.jsonl"
    line = {"question": "Where is the key?", "answer": "under the mat"}
    text = "The key is under the mat. "
    # Every second document is shorter than S + 2L = 144 tokens.
    passages = [text * (20 if i % 2 else 1) + str(i) for i in range(24)]
    data.write_text("".join(json.dumps(line | {"my passage": passage}) + "\n" for passage in passages))
    output = tmp_path / "run"
    done = train_alone(
        "+recipe=smoke", "data=files", f"data.path={data}", f"output_dir={output}", "log.wandb=disabled",
        "optim.num_epochs=0.5", "data.columns={context: 'my passage'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {row["task"] for row in rows_of(output, "eval")} == {"qa"}
    steps = rows_of(output, "train")
    assert steps[0]["num_target_tokens"] > 0
    (report,) = rows_of(output, "data")
    assert (report["num_rows"], report["num_read"], report["is_whole"]) == (20, 20, True)
    assert len(steps) == math.ceil(report["num_sequences"] / 2)
    assert f"data: counted over all 20 rows: 20 documents of {report['num_tokens']:,} tokens" in done.stdout
    assert f"{len(steps)} steps are {len(steps) / report['num_sequences']:.2f} epochs" in done.stdout
    (summary,) = rows_of(output, "summary")
    short, total = (sum(row[name] for row in steps) for name in ("num_short_tokens", "num_tokens"))
    assert summary["short_token_share"] == short / total and 0.1 < short / total < 0.5
    too_short = "in documents of at most sink_size + 2 * lag_size = 144 tokens, of which LRSA compresses nothing"
    before, after = [line for line in done.stdout.splitlines() if too_short in line]
    assert before.startswith("warning: ") and "of the training data" in before
    assert after.startswith(f"{100 * short / total:.1f} % of the tokens trained on")


def refused(capfd, monkeypatch, *arguments: str, command: str = "train") -> str:
    """The one sentence with which a command is refused in this process, before any process group starts."""
    from launch import evaluate, plan, selftest, train
    from launch.cli.command import run_command
    from lrsa_ds.costs.settings import PlanConfig
    from lrsa_ds.evaluate.config import EvaluateConfig

    commands = {
        "train": (train.action,),
        "selftest": (selftest.action,),
        "evaluate": (evaluate.action, "evaluate", EvaluateConfig),
        "plan": (plan.action, "train", PlanConfig, True),
    }
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert run_command(*commands[command]) == 2
    finally:  # this process stays, and is no run
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not torch.distributed.is_initialized()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_data(capfd, monkeypatch, tmp_path):
    data = tmp_path / "rows.jsonl"
    command = ["+recipe=smoke", "data=files", f"data.path={data}"]
    assert f"data.path='{data}' does not exist" in refused(capfd, monkeypatch, *command)
    data.write_text("")
    assert "which is empty" in refused(capfd, monkeypatch, *command)
    good = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    data.write_text(good * 9 + '{"prompt": "a", "compl\n')
    assert f"{data}, line 10: broken JSON" in refused(capfd, monkeypatch, *command)
    data.write_text(good * 9 + json.dumps({"prompt": "a"}) + "\n")
    assert f"{data}, line 10: completion is missing" in refused(capfd, monkeypatch, *command)
    data.write_text(good * 4)
    assert "eval.num_examples=4" in refused(capfd, monkeypatch, *command, "eval.num_examples=4")


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["parallel.sp_size=2"], "parallel.sp_size=2 does not divide the 1 processes"),
        (["seq_len=64", "data.context_length=null"], "give at least"),
        (["attention.backend=flex"], "needs a CUDA device"),
        (["model.random.rope_parameters={rope_type: dynamic, factor: 4.0, rope_theta: 1e4}"], "rope_type=dynamic"),
        (["attention=dense", "model.random.rope_parameters={rope_type: dynamic, factor: 4.0}"], "rope_type=dynamic"),
        (["model.random.rope_parameters={rope_type: longrope, rope_theta: 1e4}"], "model.random="),
        (["model.liger_kernel=true"], "model.liger_kernel=true needs a CUDA device"),
        (["attention.backend=fa4"], "attention.backend=fa4 is not possible: it needs a CUDA device"),
        (["model=hub", "model.name=/no/such/model"], "model.name"),
        (["model=hub", "model.name=some-org/no-such-model"], "the hub cannot be reached: set model.name to a local"),
        (["data=hub", "data.name=some-org/no-such-data"], "use data=files with data.path"),
        (["optim.lr=fast"], "optim.lr"),
        (["log.peak_tflops=0"], "log.peak_tflops=0.0 is not valid: give the dense bf16 peak"),
        (['attention.layers={"0":1.0,"1-":0.25,"3":0.5}'], "attention.layers names layer 3 twice"),
        (["attention.layers={0-7:0.25}"], "attention.layers names layer 7, and the model has 2 layers, 0 to 1"),
        (["attention.layers={0:0.25}"], "attention.layers leaves out layer 1: the model has 2 layers"),
        (
            ["model.random.hidden_size=65536", "+model.random.head_dim=8", "model.random.intermediate_size=1048576"],
            "GB free, and the exported model needs",
        ),
    ],
)
def test_bad_settings(capfd, monkeypatch, tmp_path, arguments, said):
    output = f"output_dir={tmp_path}/run"
    assert said in refused(capfd, monkeypatch, "+recipe=smoke", "log.wandb=disabled", output, *arguments)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_selftest_without_sequence_parallelism(capfd, monkeypatch):
    said = refused(capfd, monkeypatch, "+recipe=smoke", command="selftest")
    assert "set parallel.sp_size to 2 or more" in said


def test_an_export_that_does_not_fit_is_said_and_the_run_not_marked_as_complete(tmp_path):
    """A limit on the size of a file stands for a full disk: the weights are the one large file of this run."""
    command = [sys.executable, "launch/train.py", "+recipe=smoke", *SHORT, f"output_dir={tmp_path}"]
    done = run(["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *command])
    assert done.returncode == 2
    assert "the model could not be written to" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "COMPLETED").exists() and not (tmp_path / "model").exists()
    assert len(rows_of(tmp_path, "train")) == 2


def test_evaluation_is_shared_by_ranks_and_goes_on_where_it_stopped(smoke, tmp_path, capfd, monkeypatch):
    model = f"model.name={smoke[0] / 'model'}"
    fixed = [model, "lengths=[512]", "cache.prefill=[dense,chunked,full]", "tasks=[needle,perplexity]"]
    shared = tmp_path / "shared"
    more = ["num_samples=2", f"output_dir={shared}", "log.wandb=offline"]
    done = run_as_ranks(*fixed, *more, script="evaluate", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 samples, 0 of them done before" in done.stdout and "lag 64" in done.stdout
    assert (shared / "results.txt").read_text() in done.stdout
    assert list(tmp_path.iterdir()) == [shared]  # nothing in outputs/, where it writes by itself
    first = (shared / "results.jsonl").read_text().splitlines()
    assert len(first) == 2 * 5 + 2 * 3
    logged = wandb_history(wandb_records(shared))[-1]
    assert logged["results/needle/512/dense/recall"] == 0.0
    assert "results/needle/512/chunked@0.125/recall" in logged and "results/needle/512/after@0.125/recall" in logged
    assert "sample 4/4" in done.stderr
    assert {"results/path", "needles/path", "perplexity/path", "scores_512/path"} <= set(logged)

    # A rank was killed while it wrote: its whole rows stay, the torn one is done again.
    (shared / "results.rank1.jsonl").write_text("\n".join(first[:3]) + "\n" + first[3][:20])
    (shared / "results.jsonl").write_text("\n".join(first[4:]) + "\n")
    more = [*fixed, "num_samples=3", "log.wandb=disabled"]
    again = run_alone("evaluate", *more, f"output_dir={shared}")
    assert again.returncode == 0, again.stderr
    assert "6 samples, 3 of them done before" in again.stdout
    alone = run_alone("evaluate", *more, f"output_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    rows = [read_results(directory) for directory in (shared, tmp_path / "alone")]
    assert all(row.pop("seconds") > 0 for found in rows for row in found if "prediction" in row)
    assert rows[0] == rows[1]
    assert "right answers" in (shared / "results.html").read_text()

    said = refused(capfd, monkeypatch, *more, f"output_dir={shared}", "seed=1", "cache.lag_size=32", command="evaluate")
    assert "another configuration, which differs in seed, cache:" in said and "overwrite=true" in said
    said = refused(capfd, monkeypatch, model, "lengths=[512,144]", command="evaluate")
    assert "lengths=144 is too short for anything to be compressed" in said
    assert "give at least 145, cache.lag_size of at most 63, or cache.prefill=[dense]" in said


def test_the_answers_of_a_loaded_model(smoke):
    import lrsa_ds

    model, tokenizer, new_cache = lrsa_ds.load(smoke[0] / "model", device="cpu")
    ids = tokenizer("Some words. " * 40, return_tensors="pt").input_ids
    cache = new_cache()
    logits = lrsa_ds.prefill(model, ids, cache)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
    assert (logits - expected).abs().max() <= 1e-4
    assert cache.num_held < ids.shape[1] / 2
    text = Path(smoke[0] / "long.txt")
    text.write_text("Some words. " * 200)
    done = run_alone("chat", str(smoke[0] / "model"), str(text), "What?", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert " x less): " in done.stdout and "\nWhat?\n" in done.stdout


def test_exported_adapters_are_evaluated_and_answer(tmp_path):
    output, model = tmp_path / "run", tmp_path / "run" / "model"
    options = [*SHORT, "model.lora.rank=4", "model.lora.export=adapter", f"output_dir={output}"]
    done = train_alone("+recipe=smoke", *options)
    assert done.returncode == 0, done.stderr
    fixed = [f"model.name={model}", "lengths=[256]", "tasks=[needle]", "num_samples=1", "log.wandb=disabled"]
    done = run_alone("evaluate", *fixed, f"output_dir={tmp_path / 'evaluation'}")
    assert done.returncode == 0, done.stderr
    assert "lag 64" in done.stdout
    text = tmp_path / "long.txt"
    text.write_text("Some words. " * 50)
    done = run_alone("chat", str(model), str(text), "What?", "--max-new-tokens", "3")
    assert done.returncode == 0 and "\nWhat?\n" in done.stdout, done.stderr
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model / "base"), model)


def test_adapters_evaluations_on_the_way_the_best_model_and_a_trace(tmp_path):
    output = tmp_path / "run"
    command = [
        "+recipe=smoke", f"output_dir={output}", "log.wandb=offline", "log.profile_steps=[2,3]", "model.lora.rank=4",
        "eval.before=false", "eval.every=2", "eval.num_examples=2", "checkpoint.best=true", "checkpoint.every=4",
    ]  # fmt: skip
    secret = "0123456789abcdef" * 2 + "01234567"
    done = run([sys.executable, "-c", f"import os; os.environ['WANDB_API_KEY']='{secret}'\n" + ALONE, *command])
    assert done.returncode == 0, done.stderr
    assert {row["when"] for row in rows_of(output, "eval")} == {"step 2", "step 4", "after"}
    best = AutoModelForCausalLM.from_pretrained(output / "best").state_dict()
    final = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    assert best.keys() == final.keys() and not any("lora" in name for name in final)
    events = json.loads((output / "trace.json").read_text())["traceEvents"]
    assert any("attention" in event.get("name", "") for event in events)
    # Nothing that a run leaves behind holds the key of W&B.
    for path in output.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path

    # It resumes with its adapters, at another number of ranks.
    (output / "COMPLETED").unlink()
    newest = max((output / "checkpoints").iterdir())
    shutil.rmtree(newest)
    again = run_as_ranks(*command[:2], "log.wandb=disabled", *command[3:], "optim.grad_accum=1", num_ranks=2)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 4" in again.stdout and "which 1 ranks wrote" in again.stdout
