"""How large the demo is for each model: what fits on two cores, and what each choice was made for."""

from __future__ import annotations

from dataclasses import replace

from sentei.pipeline.demo.demo import DemoSize
from sentei.pipeline.demo.traffic import MixOptions
from sentei.pipeline.evaluation.evaluate import EvaluateOptions
from sentei.pipeline.ladder.break_even import BreakEven
from sentei.pipeline.ladder.calibrate import CalibrateOptions
from sentei.pipeline.ladder.distill import RESIDUAL, DistillOptions
from sentei.pipeline.ladder.targets import RungTarget
from sentei.pipeline.ladder.verify import VerifyOptions
from sentei.pipeline.measure.decode import Steps
from sentei.pipeline.measure.latency import BEST_DENSE
from sentei.pipeline.models import POCKET
from sentei.pipeline.packaged import SMOLLM2

POCKET_SIZE = DemoSize(
    # Single tokens, and for the layer that recalls in as many dimensions as its heads have: at a tenth of its
    # blocks 32 find 0.73 of what it needs, 64 find 0.83. The other layers look at everything a little: any
    # score will do, and a twentieth may be lost where that is cheaper, but no needle.
    distill=DistillOptions(
        form="low_rank",
        rank=64,
        pool_tokens=1,
        window_tokens=4096,
        num_windows=9,
        num_held_out=3,
        blocks_per_window=6,
        learning_rate=1e-3,
        max_epochs=4,
        lost_need=0.05,
        lost_needles=0.001,
    ),
    calibrate=CalibrateOptions(
        window_tokens=8192,
        num_windows=3,
        blocks_per_window=24,
        targets=tuple(
            RungTarget(name, missed_needles=0.03, density=share)
            for name, share in (("mild", 0.4), ("medium", 0.2), ("bold", 0.1))
        ),
        verify=VerifyOptions(window_tokens=8192, num_windows=2, blocks_per_window=12),
    ),
    evaluate=EvaluateOptions(
        window_tokens=8192,
        num_windows=2,
        task_kinds=("passkey", "key_value", "multi_key"),
        task_lengths=(8192,),
        num_tasks=4,
    ),
    # Prompts where it pays: below some 4,000 tokens there is little attention to save.
    mix=MixOptions(prompt_tokens=(256, 8192, 8192, 8192), answer_tokens=8, text_tokens=16, text_share=0.25),
    clients=1,
    think_s=0.2,
    fault_past_tokens=1024,
    attention="best",
    max_rollout_s=600.0,
)

# Models of some hundred million parameters: a forward pass over 8k tokens takes 4 s on two cores with
# AVX512-BF16, half a minute without.
LARGE_SIZE = DemoSize(
    # Means of 4 tokens: means of 16 lose needles, and on these heads of 256 low rank 64
    # has less KL but more NLL (docs/adr/0010).
    distill=replace(RESIDUAL, num_held_out=3, blocks_per_window=10),
    # Rungs by density: bounds on missed notes would leave prompts as short as this demo's all dense.
    calibrate=CalibrateOptions(
        window_tokens=8192,
        num_windows=3,
        blocks_per_window=24,
        targets=tuple(
            RungTarget(name, density=share) for name, share in (("mild", 0.5), ("medium", 0.2), ("bold", 0.1))
        ),
        verify=VerifyOptions(window_tokens=8192, num_windows=1),
    ),
    evaluate=EvaluateOptions(
        window_tokens=8192,
        num_windows=1,
        task_kinds=("passkey", "key_value"),
        task_lengths=(8192,),
        num_tasks=1,
        timed_runs=1,
    ),
    # Just past the break-even length: each audited session prefills its prompt four times on two cores, and
    # at lengths where it pays a rollout would take hours.
    mix=MixOptions(prompt_tokens=(1152, 1280), answer_tokens=6, text_tokens=6),
    clients=1,
    think_s=4.0,
    fault_past_tokens=512,
    attention="best",
    max_rollout_s=960.0,
    threads=2,
    # At these lengths nothing is saved: the rollout is held, as it has to be (docs/measured.md, prefill).
    expected="held",
)


# Full attention at every layer is more than half of a prefill at 8k: there is something to gain. Measured on
# two cores with AVX512-BF16: 8 minutes until traffic, 22 until the rung is promoted, 4 until the fault is
# rolled back; a session that dense serves takes half a minute, its three replays included
# (docs/measured/2026-11-28.md).
SMOLLM2_SIZE = DemoSize(
    distill=DistillOptions(),
    # A tenth is faster still, but costs 15% of perplexity on some texts (docs/measured.md).
    calibrate=CalibrateOptions(
        window_tokens=8192,
        num_windows=3,
        blocks_per_window=24,
        targets=tuple(RungTarget(name, density=share) for name, share in (("mild", 0.2), ("bold", 0.15))),
        verify=VerifyOptions(window_tokens=8192, shorter_tokens=(4096,), num_windows=2, blocks_per_window=12),
        decode=BreakEven(Steps(2, 3), batches=(1,)),  # the demo's server runs one sequence at a time
    ),
    evaluate=EvaluateOptions(
        window_tokens=8192,
        num_windows=2,
        task_kinds=("passkey", "key_value"),
        task_lengths=(8000,),
        num_tasks=2,
        blocks_per_window=12,
        timed_runs=1,
        warm_up_tokens=2048,
        dense_forms=(BEST_DENSE,),  # of the others compiled Flex takes three times as long, sdpa five times
        baseline_rungs=(),
    ),
    mix=MixOptions(prompt_tokens=(5632, 6656, 7680), answer_tokens=16, text_tokens=16, text_share=0.75),
    clients=1,
    think_s=1.0,
    # What is served while the replays of an answer run is not audited: it would cost and prove nothing.
    waits_for_audits=True,
    fault_past_tokens=1024,
    attention="best",
    max_rollout_s=3600.0,
    # One thread each: an audit's two dense replays run side by side, and wait for no thread but their own.
    dense_replicas=2,
    policy="demo-smollm2",
)


def demo_size(model: str) -> DemoSize:
    """Return the demo's size for a model."""
    return {POCKET: POCKET_SIZE, SMOLLM2: SMOLLM2_SIZE}.get(model, LARGE_SIZE)
