"""`sentei distill`, `calibrate`, `seal`, `register`: the offline steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.table import Table

from sentei.pipeline.cli.extras import needs
from sentei.pipeline.cli.output import Output, check_choice
from sentei.pipeline.home import sentei_home

if TYPE_CHECKING:
    from sentei.kernels.hf.ladder import Rung

DTYPES = ("float32", "bfloat16")
Model = Annotated[
    str, typer.Option("--model", help="pocket, gemma-3-270m, smollm2-135m, a checkpoint folder or a hub id.")
]
CorpusName = Annotated[
    list[str] | None,
    typer.Option("--corpus", help="A file, a folder or stdlib, the default; repeatable, in equal parts."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16 [default: the faster one here; pocket: float32]."),
]
DeviceName = Annotated[
    str, typer.Option("--device", help="auto (a GPU where there is one), cpu, or cuda (ROCm's GPUs, too).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Windows = Annotated[int | None, typer.Option("--windows", help="Number of text windows.", min=1)]


@needs("train")
def run_distill(
    model: Model = "pocket",
    corpus: CorpusName = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per training window.", min=256)] = None,
    windows: Windows = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="low_rank (single tokens) or residual (means of tokens) [default: by the size of heads]."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Learned dimensions.", min=1)] = None,
    pool: Annotated[int | None, typer.Option(help="Tokens per pooled key.", min=1)] = None,
    query_pool: Annotated[
        int | None,
        typer.Option(help="Of so many queries at least one is scored; with single tokens.", min=1, max=16),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Train low-rank weights with a rung's mask on; after calibrate.")
    ] = False,
    rung: Annotated[str | None, typer.Option(help="With --joint: whose mask [default: bold].")] = None,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    as_json: Json = False,
) -> None:
    """Teach the scorer which key blocks hold each row's attention mass."""
    if joint:
        if any(given is not None for given in (form, pool, query_pool)):
            raise typer.BadParameter(
                "shape the scorer, which --joint leaves as it is", param_hint="--form, --pool, --query-pool"
            )
        changes = {"window_tokens": tokens, "num_windows": windows, "rank": rank, "rung": rung}
        output = Output(as_json=as_json)
        _run_joint(open_bench(model, corpus, output, dtype, device), changes, output)
        return
    if rung is not None:
        raise typer.BadParameter(
            "belongs to --joint: the scorer is distilled before there are rungs", param_hint="--rung"
        )
    from sentei.kernels.scorer.network import Form
    from sentei.pipeline.ladder.distill import usual_options
    from sentei.pipeline.steps import distill_step

    output = Output(as_json=as_json)
    check_choice("--form", [form] if form else (), get_args(Form))
    if form is None and pool is not None and pool > 1:
        form = "residual"
    bench = open_bench(model, corpus, output, dtype, device)
    options = changed(
        usual_options(bench.loaded.model, cast("Form | None", form)),
        window_tokens=tokens,
        num_windows=windows,
        rank=rank,
        pool_tokens=pool,
        query_pool=query_pool,
    )
    with output.progress() as progress:
        adapter = distill_step(bench, options, progress)
    output.say(f"adapter in [bold]{bench.adapter_dir}[/]: next, `sentei calibrate --model {model}`")
    output.emit(
        {"model": model, "adapter": str(bench.adapter_dir), "figures": dict(adapter.manifest.figures)}
    )


def _run_joint(bench: Any, changes: dict[str, Any], output: Output) -> None:
    from sentei.pipeline.experiments.joint import JointOptions
    from sentei.pipeline.steps import joint_step

    with output.progress() as progress:
        report = joint_step(bench, changed(JointOptions(), **changes), progress)
    document = report.to_dict()
    table = Table("variant", "density", "NLL", "difference from dense (95% CI)")
    for row in document["rows"]:
        low, high = row["nll_delta_ci"]
        difference = f"{row['nll_delta']:+.4f} ({low:+.4f} to {high:+.4f})"
        table.add_row(row["variant"], f"{row['density']:.1%}", f"{row['nll']:.4f}", difference)
    low, high = report.joint_minus_post_hoc_ci
    output.say(
        table,
        f"trained under rung {report.rung} for {report.train_s:.0f} s; held-out KL from dense "
        f"{report.kl_held_out_before:.4f} -> {report.kl_held_out_after:.4f}; joint minus post-hoc "
        f"{report.joint_minus_post_hoc:+.4f} ({low:+.4f} to {high:+.4f})",
        f"low-rank weights in [bold]{bench.adapter_dir}[/], off unless asked for (docs/guides/joint.md)",
    )
    output.emit(document)


@needs("train")
def run_calibrate(
    model: Model = "pocket",
    corpus: CorpusName = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per held-out window.", min=256)] = None,
    windows: Windows = None,
    density: Annotated[
        list[float] | None,
        typer.Option(
            help="Make a rung of this share of the blocks; repeatable, in place of the usual rungs."
        ),
    ] = None,
    nll: Annotated[
        list[float] | None,
        typer.Option(
            help="Make the boldest rung whose loss on held-out text is at most so many nats per token above "
            "dense's, its 95% interval included; repeatable."
        ),
    ] = None,
    speed: Annotated[
        list[float] | None,
        typer.Option(
            help="Make the mildest rung that prefills so many times as fast as dense here; repeatable."
        ),
    ] = None,
    missed_needles: Annotated[
        float | None,
        typer.Option(
            help="With --density, --nll or --speed: share of what questions about notes need that no KV "
            "group may miss.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    dense_last: Annotated[
        int | None,
        typer.Option(help="Last rows of a prompt that keep everything, as the question stands there.", min=0),
    ] = None,
    query_block: Annotated[
        int | None,
        typer.Option(help="Rows that choose together: 16, 32 or 64 [default: 16 on a CPU, 64 on a GPU]."),
    ] = None,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    as_json: Json = False,
) -> None:
    """Turn scores into a ladder of rungs, each verified on held-out text."""
    from sentei.pipeline.ladder.calibrate import CalibrateOptions
    from sentei.pipeline.ladder.targets import density_targets, nll_targets, speed_targets
    from sentei.pipeline.steps import calibrate_step

    if missed_needles is not None and not (density or nll or speed):
        raise typer.BadParameter(
            "belongs to --density, --nll and --speed: the usual rungs have bounds of their own",
            param_hint="--missed-needles",
        )
    output = Output(as_json=as_json)
    asked = 1.0 if missed_needles is None else missed_needles
    targets = (
        *density_targets(density or (), asked),
        *nll_targets(nll or (), asked),
        *speed_targets(speed or (), asked),
    )
    options = changed(
        CalibrateOptions(),
        window_tokens=tokens,
        num_windows=windows,
        targets=targets or None,
        query_block_tokens=query_block,
        dense_last_tokens=dense_last,
    )
    bench = open_bench(model, corpus, output, dtype, device)
    with output.progress() as progress:
        ladder = calibrate_step(bench, options, progress)
    rungs = [_with_verdict(rung) for rung in ladder.rungs]
    output.say(_ladder_table(rungs))
    output.emit({"model": model, "adapter": str(bench.adapter_dir), "rungs": rungs})


def _with_verdict(rung: Rung) -> dict[str, Any]:
    """Return a rung as plain values, with whether it kept what it was made for, and at which density."""
    from sentei.pipeline.plain import to_plain

    checks = rung.verified.by_length if rung.verified is not None else ()
    chosen = [rung.chosen_density(check) for check in checks]
    return dict(to_plain(rung)) | {"is_kept": rung.is_kept, "chosen_density": chosen}


@needs("train")
def run_register(
    model: Model = "pocket",
    alias: Annotated[str, typer.Option(help="Alias of the new version.")] = "candidate",
    adapter: Annotated[Path | None, typer.Option(help="The adapter's folder [default: home's].")] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="A policy that it is meant for: refuse slices past what the ladder was verified at."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Register the adapter in MLflow under an alias."""
    from sentei.pipeline.cli.policy_file import check_coverage, read_policy_file
    from sentei.pipeline.plain import to_plain
    from sentei.pipeline.tracking.register import register_adapter
    from sentei.pipeline.tracking.tracker import MlflowTracker
    from sentei.policies.schema.load import load_policy

    output = Output(as_json=as_json)
    home = sentei_home().create()
    folder = (adapter or home.find_adapter(model)).resolve()
    tags = {}
    if policy is not None:
        text = read_policy_file(policy)
        meant_for = load_policy(text, source=str(policy))
        check_coverage(meant_for, text, str(policy), folder)
        tags = {"policy": meant_for.metadata.name, "policy_digest": meant_for.digest}
    tracker = MlflowTracker(home.mlflow_uri, home.mlflow_artifacts)
    version = register_adapter(tracker, folder, name=f"sentei-{folder.name}", alias=alias, tags=tags)
    output.say(f"registered: {to_plain(version)}")
    output.emit(to_plain(version))


@needs("train")
def run_seal(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder.")],
    as_json: Json = False,
) -> None:
    """Write the hashes of an adapter's files into its manifest; no other files are loaded from then on."""
    from sentei.kernels.hf.adapter import seal_adapter

    output = Output(as_json=as_json)
    files = dict(seal_adapter(folder))
    output.say(*(f"sealed {name}: {digest}" for name, digest in files.items()))
    output.emit({"folder": str(folder), "files": files})


def open_bench(
    model: str,
    corpus: list[str] | None,
    output: Output,
    dtype: str | None = None,
    device: str = "auto",
) -> Any:
    """Load model and corpus, and say so."""
    import torch

    from sentei.pipeline.models import resolve_model
    from sentei.pipeline.steps import Workbench
    from sentei.pipeline.text.corpus import load_corpora

    check_choice("--dtype", [dtype] if dtype else (), DTYPES)
    precision = None if dtype is None else getattr(torch, dtype)
    with output.errors.status(f"loading {model}"):
        loaded = resolve_model(model, dtype=precision, device=device)
        bench = Workbench(loaded, load_corpora(corpus), sentei_home().create())
    running = next(loaded.model.parameters()).dtype
    where = f"{str(running).removeprefix('torch.')} on {loaded.device.type}"
    output.say(f"[bold]{model}[/] in {where}, corpus {bench.corpus.name}")
    if bench.corpus.passed_over:
        output.say(f"not read in the corpus: {bench.corpus.passed_over}")
    return bench


def _ladder_table(rungs: list[dict[str, Any]]) -> Table:
    table = Table(
        "rung",
        "made for",
        "kept",
        "density by length (past the break-even)",
        "dropped mass: mean, p99",
        "NLL difference (CI)",
        "prefill, times dense",
        "decodes sparse from",
    )
    for rung in rungs:
        found = rung["verified"]
        if found is None:
            table.add_row(rung["id"], "", "", "100%", "0", "", "", "")
            continue
        low, high = found["nll_delta_ci"]
        speed = found["prefill_speed"]
        table.add_row(
            rung["id"],
            _aim(rung),
            "yes" if rung["is_kept"] else "no",
            ", ".join(map(_density_at, found["by_length"], rung["chosen_density"])),
            f"{found['dropped_mass_mean']:.3f}, {found['dropped_mass_p99']:.3f}",
            f"{found['nll_delta']:+.4f} ({low:+.4f} to {high:+.4f})",
            "" if speed is None else f"{speed:.2f}",
            _break_even_text(rung["decode_break_even_tokens"]),
        )
    return table


def _aim(rung: dict[str, Any]) -> str:
    """Say what a rung was made for."""
    if rung["target_nll"] is not None:
        return f"loss at most {rung['target_nll']:g}"
    if rung["target_speed"] is not None:
        return f"speed {rung['target_speed']:g}"
    if rung["target_density"] is not None:
        return f"density {rung['target_density']:.1%}"
    return f"dropped mass {rung['bound_dropped_mass']:.3g}"


def _density_at(check: dict[str, Any], chosen: float | None) -> str:
    past = "" if chosen is None else f" ({chosen:.1%})"
    return f"{check['density']:.1%}{past} at {check['tokens']:,}"


def _break_even_text(by_batch: dict[int, int]) -> str:
    from sentei.kernels.hf.ladder import NEVER

    told = (
        f"{'never' if tokens == NEVER else f'{tokens:,} tokens'} (batch {batch})"
        for batch, tokens in by_batch.items()
    )
    return ", ".join(told) or "as prompts"


def changed(options: Any, **changes: Any) -> Any:
    """Return the options with those changed that were given."""
    from dataclasses import replace

    return replace(options, **{name: value for name, value in changes.items() if value is not None})
