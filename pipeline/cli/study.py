"""`sentei study`: scorer forms beside each other, layer by layer and over all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sentei.pipeline.cli.extras import needs
from sentei.pipeline.cli.offline import (
    CorpusName,
    DeviceName,
    Dtype,
    Json,
    Model,
    Windows,
    changed,
    open_bench,
)
from sentei.pipeline.cli.output import Output
from sentei.pipeline.home import sentei_home

if TYPE_CHECKING:
    from sentei.pipeline.experiments.study import FormSummary, StudyOptions, StudyRow


@needs("train")
def run_study(
    model: Model = "pocket",
    corpus: CorpusName = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per window.", min=256)] = None,
    windows: Windows = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="A layer to look at; repeatable [default: all].", min=0)
    ] = None,
    dtype: Dtype = None,
    device: DeviceName = "auto",
    as_json: Json = False,
) -> None:
    """Compare scorer forms on held-out text: what each must keep so as not to miss what matters."""
    from sentei.pipeline.experiments.study import StudyOptions, study, summarise_forms
    from sentei.pipeline.plain import to_plain
    from sentei.pipeline.reports.plots import save_study

    output = Output(as_json=as_json)
    options = changed(
        StudyOptions(), window_tokens=tokens, num_windows=windows, layers=tuple(layer or ()) or None
    )
    bench = open_bench(model, corpus, output, dtype, device)
    with output.progress() as progress:
        rows = study(bench.loaded, bench.corpus, options, progress)
    folder = sentei_home().create().root / "studies" / bench.adapter_dir.name
    page = save_study(rows, folder / "study.html")
    forms = summarise_forms(rows)
    document = {
        "model": model,
        "forms": to_plain(forms),
        "rows": [row.to_dict() for row in rows],
        "page": str(page),
    }
    (folder / "study.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    output.say(_study_table(rows, options), _forms_table(forms, options), f"page: {page}")
    output.emit(document)


def _study_table(rows: Sequence[StudyRow], options: StudyOptions) -> Table:
    missed = [f"{share:g}" for share in options.missed_needles]
    densities = [f"{share:g}" for share in options.densities]
    table = Table(
        "layer",
        "form",
        "dims",
        "query\nblock",
        "KL",
        *(f"kept to miss\n{float(share):.1%} of needles" for share in missed),
        *(f"at {float(share):.0%}: mass found\nmean, p5, worst head" for share in densities),
        *(f"at {float(share):.0%}:\nneedles missed" for share in densities),
    )
    for row in rows:
        at = [row.at_density[share] for share in densities]
        table.add_row(
            str(row.layer),
            row.form,
            f"{row.dims_per_token:g}",
            str(row.query_block),
            "" if row.kl is None else f"{row.kl:.3f}",
            *(f"{row.density[share]:.1%}" for share in missed),
            *(
                f"{a.mass_recall_mean:.3f}, {a.mass_recall_p5:.3f}, {a.mass_recall_worst_head:.3f}"
                for a in at
            ),
            *(f"{a.needles_missed:.2%}" for a in at),
        )
    return table


def _forms_table(forms: Sequence[FormSummary], options: StudyOptions) -> Table:
    densities = [f"{share:g}" for share in options.densities]
    shares = [f"at {float(share):.0%}: need found,\nmass dropped, needles missed" for share in densities]
    table = Table("form", "dims", "query\nblock", "KL", *shares, title="Means over the layers")
    for form in forms:
        table.add_row(
            form.form,
            f"{form.dims_per_token:.1f}",
            str(form.query_block),
            "" if form.kl is None else f"{form.kl:.3f}",
            *(
                f"{form.need_found[share]:.3f}, {form.dropped_mass[share]:.3f}, "
                f"{form.needles_missed[share]:.2%}"
                for share in densities
            ),
        )
    return table
