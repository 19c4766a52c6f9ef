"""One rank of parity checks: two optimizer steps of the real trainer against plain torch on one process.

Its argument is a JSON list of cases, each a list of options. Prints, on rank 0, a JSON list with, for each case, how
far the loss, the gradient norm and the worst gradient are from those of plain torch.
"""

import argparse
import itertools
import json
import random
import sys
from contextlib import contextmanager, nullcontext

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import IGNORE, Example, collate, pack
from lrsa_ds.data.stream import StepData
from lrsa_ds.layers import resolve
from lrsa_ds.lrsa_config import AUTO
from lrsa_ds.models.adapters import add_adapters, freeze
from lrsa_ds.models.patch import enable_checkpointing, layer_classes
from lrsa_ds.models.quantized import quantize_matrices, round_matrices
from lrsa_ds.models.tiling import num_tiles, tile_mlps
from lrsa_ds.objectives import make_objective
from lrsa_ds.parallel.mesh import rank, start_mesh, stop_mesh
from lrsa_ds.parallel.sequence import all_to_all, halo
from lrsa_ds.parallel.zero import make_engine
from lrsa_ds.settings.attention import AttentionConfig
from lrsa_ds.settings.memory import MemoryConfig
from lrsa_ds.settings.model import LoraConfig, ModelConfig
from lrsa_ds.settings.run import ObjectiveConfig, OptimConfig, ParallelConfig, ZeroConfig
from lrsa_ds.train.selftest import keep_gradients
from lrsa_ds.train.trainer import Trainer, cosine_schedule
from tests import fused
from tests.helpers import relative_error

SEQ_LEN, NUM_SEQUENCES = 160, 4
# A token that stands nowhere but where a test puts it, and the sequence where it does.
BAD_TOKEN, BAD_SEQUENCE = 96, 2
WEIGHT, TEMPERATURE = 0.7, 1.5  # of distillation
# More experts than a rank has target tokens, so that in every micro-batch some get few tokens or none.
FAMILIES = {
    "qwen3_moe": dict(num_experts=64, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "glm4_moe": dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=30),
    "deepseek_v3": dict(
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=6,
    ),
    # With a window that is longer than the stretches of four ranks.
    "olmo3": dict(sliding_window=70, layer_types=["sliding_attention", "full_attention"]),
}
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)


def sequences():
    """Four packed sequences whose documents and target counts differ widely; one has a single target."""
    draw = random.Random(3)
    examples = []
    for index, length in enumerate([160, 70, 50, 31, 110, 45, 155]):
        ids = [draw.randrange(1, BAD_TOKEN) for _ in range(length)]
        num_targets = [1, 9, 3, 20, 64, 2, 1][index]
        examples.append(Example(ids, [IGNORE] * (length - num_targets) + ids[length - num_targets :], "t", index))
    packed = list(pack(examples, SEQ_LEN, pad_id=0))
    assert len(packed) == NUM_SEQUENCES
    return packed


def settings_of(options):
    return dict(sink_size=4, lag_size=16, retention=options.retention, selection=options.selection)


def make_model(options, is_packed=True):
    """The model of a case; with `--quantize` its base is in 4 bits, or plain with the values that these have left."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        options.family,
        **SIZES,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=8,
        tie_word_embeddings=options.tied,
        **FAMILIES.get(options.family, {}),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if options.teacher:  # sharper attention, so that a dense pass predicts something else
        with torch.no_grad():
            for matrix in (p for p in model.parameters() if p.dim() > 1):
                matrix.mul_(6)
    if options.list_experts:
        for layer in model.model.layers:
            layer.mlp = ListedExperts(layer.mlp.gate)
    if options.quantize:
        settings = ModelConfig(name="", quantize=options.quantize, double_quant=options.double_quant)
        model = (quantize_matrices if is_packed else round_matrices)(model, settings)
    apply_lrsa(model, turns_of(options))
    if options.lora:
        add_adapters(model, LoraConfig(rank=2, target_parameters=options.target_parameters))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # larger ones amplify the rounding of fp32 beyond what is asked of gradients here
                torch.nn.init.normal_(parameter, std=0.02)
    freeze(model, options.freeze)
    return model.train()


class ListedExperts(torch.nn.Module):
    """Experts as modules of their own, as models from outside transformers have them; `gate` is a router of Qwen3."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        num_experts, size = gate.weight.shape
        self.experts = torch.nn.ModuleList(torch.nn.Linear(size, size) for _ in range(num_experts))

    def forward(self, hidden):
        tokens = hidden.flatten(0, -2)
        _, weights, chosen = self.gate(tokens)
        output = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():  # the others are not called
            token, place = (chosen == expert).nonzero(as_tuple=True)
            output = output.index_add(0, token, self.experts[expert](tokens[token]) * weights[token, place, None])
        return output.view_as(hidden)


def aux_loss_of(model, output, batch, options):
    """transformers' load-balancing loss, averaged over micro-batches."""
    if not options.aux:
        return output.logits.new_zeros(())
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    size, mask = SEQ_LEN * options.micro_batch, batch.is_token().long()
    losses = [
        function(
            tuple(logits[start : start + size] for logits in output.router_logits),
            model.num_experts,
            model.num_experts_per_tok,
            mask[None, start : start + size],
        )
        for start in range(0, len(mask), size)
    ]
    return torch.stack(losses).mean()


def turns_of(options):
    """The settings that steps take in turn."""
    config = LRSAConfig(**settings_of(options))
    turns = options.layers if isinstance(options.layers, list) else [options.layers]
    return [resolve(config, layers, SIZES["num_hidden_layers"]) for layers in turns]


def reference(options, optim):
    """Losses and gradients of one step over all sequences, and the loss of the next, in plain torch."""
    model = make_model(options, is_packed=False)
    batch = collate(sequences())
    num_targets = batch.num_target_tokens
    if options.bad_loss:
        batch.labels[BAD_SEQUENCE * SEQ_LEN :][:SEQ_LEN] = IGNORE  # it counts among the targets, and gives no loss

    teacher = make_model(options) if options.teacher == "start" else model

    def pass_of(model, **settings):
        return model(
            batch.input_ids[None],
            position_ids=batch.position_ids[None],
            document_lengths=batch.document_lengths,
            use_cache=False,
            **({"output_router_logits": True} if options.aux else {}),
            **settings,
        )

    turns = turns_of(options)

    def forward(step):
        output = pass_of(model, lrsa_config=turns[step % len(turns)])
        logits, aux_loss = output.logits[0], aux_loss_of(model, output, batch, options)
        loss = torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=IGNORE, reduction="sum")
        if options.teacher:
            with torch.no_grad():
                dense = LRSAConfig(sink_size=4, lag_size=16, retention=1.0)
                expected = (pass_of(teacher, lrsa_config=dense).logits[0] / TEMPERATURE).softmax(-1)
            difference = expected.log() - (logits / TEMPERATURE).log_softmax(-1)
            divergence = (expected * difference).sum(-1)[batch.labels != IGNORE].sum()
            loss = (1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * divergence
        return loss / num_targets, aux_loss

    loss, aux_loss = forward(0)
    (loss + options.aux * aux_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.AdamW(model.parameters(), optim.lr, (optim.beta1, optim.beta2), weight_decay=0.0).step()
    return loss.item(), aux_loss.item(), gradients, forward(1)[0].item()


@contextmanager
def without_halo():
    """Every rank sees zeros where the keys and values of others' tokens before its own should be."""

    def receive_zeros(group, cargo, parts, shapes):
        return whole(group, cargo, [part * 0 for part in parts] if cargo == "halo" else parts, shapes)

    whole = all_to_all.start
    halo.start = receive_zeros
    try:
        yield
    finally:
        halo.start = whole


def objective_of(options) -> ObjectiveConfig:
    if options.teacher is None:
        return ObjectiveConfig()
    return ObjectiveConfig(kind="distill", weight=WEIGHT, temperature=TEMPERATURE, teacher=options.teacher)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="qwen2")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--sp-size", type=int, default=1)
    parser.add_argument("--exchange", default="gather_kept")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--selection", default="lagkv")
    parser.add_argument("--layers", type=json.loads, default={})
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--save-attention", action="store_true")
    parser.add_argument("--tile-size", type=int, default=0)
    parser.add_argument("--aux", type=float, default=0.0)
    parser.add_argument("--list-experts", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--target-parameters", default="")
    parser.add_argument("--quantize")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--freeze", nargs="*", default=[])
    parser.add_argument("--by-module", action="store_true")
    parser.add_argument("--break-scale", action="store_true")
    parser.add_argument("--break-halo", action="store_true")
    parser.add_argument("--bad-loss", action="store_true")
    parser.add_argument("--teacher", choices=("self", "start"))
    return parser.parse_args(arguments)


def config_of(options: argparse.Namespace, backend: str, dp_size: int) -> TrainConfig:
    grad_accum = NUM_SEQUENCES // (dp_size * options.micro_batch)
    return TrainConfig(
        seq_len=SEQ_LEN,
        loss_chunk_size=7,
        objective=objective_of(options),
        model=ModelConfig(random={"model_type": options.family}, tokenizer="bytes", router_aux_loss_coef=options.aux),
        attention=AttentionConfig(**settings_of(options), backend=backend, layers=options.layers),
        parallel=ParallelConfig(sp_size=options.sp_size, exchange=options.exchange),
        zero=ZeroConfig(stage=options.stage, gather_layers=not options.by_module),
        memory=MemoryConfig(
            tiled_mlp=options.tile_size > 0, tile_size=options.tile_size or 1, save_attention=options.save_attention
        ),
        optim=OptimConfig(
            num_steps=2,
            warmup_steps=0,
            micro_batch=options.micro_batch,
            grad_accum=grad_accum,
            grad_clip=0.0,
            on_nan="skip",
        ),
    )


def check(options: argparse.Namespace) -> dict:
    mesh = start_mesh(options.sp_size, exchange=options.exchange)
    backend = fused.register() if options.save_attention else AUTO
    config = config_of(options, backend, mesh.dp_size)
    model = tile_mlps(make_model(options), num_tiles(config))
    if options.bad_loss:
        with torch.no_grad():
            model.get_input_embeddings().weight[BAD_TOKEN] = torch.nan
    if options.checkpointing:
        enable_checkpointing(model, options.offload, options.save_attention)
    objective = make_objective(config, model, load_start=lambda: make_model(options))
    engine = make_engine(config, objective, torch.float32, cosine_schedule(config.optim), layer_classes(model))
    gradients = keep_gradients(engine, deepspeed.utils.safe_get_full_grad)
    per_rank = NUM_SEQUENCES // mesh.dp_size
    everything = sequences()
    if options.bad_loss:
        everything[BAD_SEQUENCE].input_ids[1] = BAD_TOKEN
    mine = StepData(everything[mesh.dp_rank * per_rank :][:per_rank], {})
    trainer = Trainer(config, mesh, engine, itertools.repeat(mine))
    if options.break_scale:
        trainer.scale = 1.0
    rows, ran = [], fused.counts()
    with without_halo() if options.break_halo else nullcontext():
        trainer.fit(lambda row, position: rows.append(row))
    engine.destroy()
    ran = [after - before for after, before in zip(fused.counts(), ran, strict=True)]
    loss, aux_loss, expected, second = reference(options, config.optim)
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    return {
        "loss_error": abs(rows[0]["loss"] - loss) / loss,
        "norm_error": abs(rows[0]["grad_norm"] - norm) / norm,
        "aux_loss_error": abs(rows[0].get("aux_loss", 0.0) - aux_loss),
        "expert_load": rows[0].get("expert_load"),
        "worst_gradient": max((relative_error(gradients[name], g), name) for name, g in expected.items()),
        "num_tokens": rows[0]["num_tokens"],
        "num_target_tokens": rows[0]["num_target_tokens"],
        "num_skipped_rows": [row.get("num_skipped_rows", 0) for row in rows],
        "second_loss_error": abs(rows[1]["loss"] - second) / second,
        "logged": {name: rows[0].get(name) for name in ("target_loss", "divergence")},
        "kernel_ran": ran,
        "traffic": {name: value for name, value in rows[0].items() if "_bytes_" in name},
    }


def main():
    results = [check(parse(list(map(str, case)))) for case in json.loads(sys.argv[1])]
    if rank() == 0:
        print(json.dumps(results))
    stop_mesh()


main()
