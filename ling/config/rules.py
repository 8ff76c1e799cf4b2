"""The rules between settings: one small function each, which yields what is wrong and how to mend it.

The rules that concern one branch stand in `model_rules.py` and `layout_rules.py`; here are the others and the check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ling.config.derived import activation_for, consumed_samples_after, data_sources
from ling.config.duration import parse_duration
from ling.config.errors import UserError
from ling.config.keys import all_keys, branches, did_you_mean, limit_problems
from ling.config.layout_rules import LAYOUT_RULES
from ling.config.load import summary
from ling.config.model_rules import MODEL_RULES
from ling.config.plugins import load_plugins
from ling.config.schema import Config

Rule = Callable[[Config, int | None], Iterator[str]]


def check_config(config: Config, world_size: int | None = None) -> None:
    """Raise UserError unless the settings fit each other and, where it is known, the number of ranks.

    Needs neither torch nor a GPU. The message is the first problem found, and how many more there are. Imports
    `run.plugins`, since a rule may concern what they add.
    """
    load_plugins(config.run.plugins)
    problems = list(limit_problems(config))
    if not problems:  # the rules may divide by sizes that the limits keep positive
        problems = [problem for rule in RULES for problem in rule(config, world_size)]
    if problems:
        raise UserError(summary(problems))


def config_warnings(config: Config) -> list[str]:
    """What is allowed, but doubtful: one line each. For a config that `check_config` has passed."""
    from ling.activations.table import resolve

    kinds = ("dense",) if config.model.num_moe_experts is None else ("dense", "shared", "routed")
    specs = [activation_for(config.model, kind) for kind in kinds]
    lines = [line for spec in specs for line in resolve(spec, num_layers=config.model.num_layers).warnings()]
    ramp, taken = config.train.rampup_batch_size, consumed_samples_after(config, config.train.train_iters)
    if ramp is not None and taken <= ramp[2]:
        lines.append(f"train.rampup_batch_size: the run takes {taken} samples and ends before its ramp of {ramp[2]}")
    return list(dict.fromkeys(lines))


def _names(config: Config, world: int | None) -> Iterator[str]:
    name = config.run.name
    if name in ("", ".", "..") or name != name.strip() or not name.isprintable() or set(name) & set("/\\"):
        yield f"run.name: {name!r} is not a plain name; write letters, digits, - and _ (a path goes to run.dir)"
    if not config.data.tokenizer.strip():
        yield "data.tokenizer: is empty; give the tokenizer's folder or SentencePiece model"
    for key in config.train.allow_change:
        if key not in all_keys() and key not in branches():
            hint = did_you_mean(key, [*branches(), *all_keys()])
            yield f"train.allow_change: {key!r} is no key of a config{hint or '; see `ling config keys`'}"
    if config.run.dir is not None and not config.run.dir.strip():
        yield "run.dir: is empty; give a folder, or null for runs/<name>"


def _data_forms(config: Config, world: int | None) -> Iterator[str]:
    if isinstance(config.data.train, dict) or config.data.train is None:
        yield "data.train: expected a prefix or a list of prefixes or {path, weight, name}; write data.train: [prefix]"
        return
    for key in ("train", "valid", "test"):
        try:
            sources = data_sources(getattr(config.data, key), where=f"data.{key}")
        except UserError as error:
            yield str(error)
            continue
        amounts = [source for source in sources if source.unit != "weight"]
        if amounts and key != "train":
            yield f"data.{key}: {amounts[0].path} has {amounts[0].unit}; held-out data is read once, remove it"
    if config.data.cache_dir is not None and not config.data.cache_dir.strip():
        yield "data.cache_dir: is empty; give a folder, or null for data_cache beside the run's folder"


def _split(config: Config, world: int | None) -> Iterator[str]:
    split = config.data.split
    if split is None:
        return
    if len(split) not in (2, 3) or not all(0 <= share < float("inf") for share in split) or not split[0] > 0:
        yield f"data.split: expected the shares [train, valid] or [train, valid, test], got {split}; write [0.99, 0.01]"
    for key in ("valid", "test"):
        if getattr(config.data, key) is not None:
            yield f"data.split: parts the training data, and data.{key} names files; keep one of the two"


def _sequences(config: Config, world: int | None) -> Iterator[str]:
    length, longest = config.data.sequence_length, config.model.max_position_embeddings
    if length > longest:
        yield (
            f"data.sequence_length: {length} is more than model.max_position_embeddings ({longest}); "
            "shorten the one or raise the other"
        )
    if config.data.reset_attention_mask and config.runtime.attention in ("flash", "te"):
        yield (
            f"data.reset_attention_mask: not supported by runtime.attention={config.runtime.attention}; "
            "set runtime.attention=sdpa, or data.reset_attention_mask=false"
        )


def _time_limit(config: Config, world: int | None) -> Iterator[str]:
    try:
        if config.train.time_limit is not None:
            parse_duration(config.train.time_limit)
    except ValueError as error:
        yield f"train.time_limit: {error}"


def _evaluation(config: Config, world: int | None) -> Iterator[str]:
    if config.train.eval_interval > 0 and config.data.valid is None and config.data.split is None:
        yield "train.eval_interval: there is nothing to evaluate on; give data.valid, or set train.eval_interval=0"


def _learning_rate(config: Config, world: int | None) -> Iterator[str]:
    optim, steps = config.optim, config.train.train_iters
    warmup, end = optim.lr_warmup_iters, optim.lr_decay_iters or steps
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr: {optim.min_lr} is more than optim.lr ({optim.lr}); lower it"
    if warmup > steps:
        yield f"optim.lr_warmup_iters: {warmup} is more than train.train_iters ({steps}); shorten the warm-up"
    elif optim.lr_decay_style != "constant" and warmup >= end:
        source = "train.train_iters" if optim.lr_decay_iters is None else "optim.lr_decay_iters"
        yield f"{source}: the decay ends at step {end}, not after the warm-up ({warmup} steps); raise {source}"


def _wsd(config: Config, world: int | None) -> Iterator[str]:
    optim = config.optim
    decay, end = optim.lr_wsd_decay_iters, optim.lr_decay_iters or config.train.train_iters
    if optim.lr_decay_style != "WSD":
        if decay is not None:
            yield (
                f"optim.lr_wsd_decay_iters: has no meaning with lr_decay_style={optim.lr_decay_style}; "
                "remove it, or set optim.lr_decay_style=WSD"
            )
    elif decay is None:
        yield "optim.lr_wsd_decay_iters: not given; lr_decay_style=WSD needs the length of its decay in steps"
    elif optim.lr_warmup_iters + decay > end:
        yield (
            f"optim.lr_wsd_decay_iters: warm-up ({optim.lr_warmup_iters}) and decay ({decay}) take more than the "
            f"{end} steps of the schedule; shorten one"
        )


def _precision(config: Config, world: int | None) -> Iterator[str]:
    recipe = config.precision.recipe
    if recipe == "fp8_emulated":
        yield "precision.recipe: fp8_emulated is not built and proved yet; use bf16, fp32 or fp8"
    if recipe == "fp8" and config.runtime.backend == "torch":
        yield "precision.recipe: fp8 needs Transformer Engine's linear layers; set runtime.backend=te, or use bf16"


def _checkpoints(config: Config, world: int | None) -> Iterator[str]:
    settings = config.checkpoint
    if settings.load is not None and not settings.load.strip():
        yield "checkpoint.load: is empty; give a checkpoint or a run's folder, or null"
    if config.train.recovery_steps and settings.load is None:
        yield "train.recovery_steps: has no meaning without checkpoint.load; set it to 0, or give checkpoint.load"
    if settings.max_lost_steps is not None and not settings.async_save:
        yield "checkpoint.max_lost_steps: has no meaning without checkpoint.async_save; set that, or remove it"
    if settings.max_lost_steps is not None and settings.max_lost_steps < settings.save_interval:
        yield (
            f"checkpoint.max_lost_steps: {settings.max_lost_steps} steps cannot be held with "
            f"checkpoint.save_interval={settings.save_interval}; lower the interval, or raise it to that"
        )
    if settings.keep_every is not None and settings.keep_last is None:
        yield "checkpoint.keep_every: has no meaning while all are kept; set checkpoint.keep_last, or remove it"
    if settings.merge_eval_last is not None and config.data.valid is None and config.data.split is None:
        yield "checkpoint.merge_eval_last: there is nothing to evaluate on; give data.valid, or set it to null"
    if settings.merge_eval_last and settings.keep_last and settings.merge_eval_last > settings.keep_last:
        yield (
            f"checkpoint.merge_eval_last: {settings.merge_eval_last} checkpoints are to be merged, but only "
            f"checkpoint.keep_last={settings.keep_last} are kept; raise checkpoint.keep_last"
        )
    every, interval = settings.export_every, settings.save_interval
    if every is not None and interval == 0:
        yield (
            "checkpoint.export_every: an export is made of a checkpoint, and with checkpoint.save_interval=0 there is "
            "one at the end only; set checkpoint.save_interval, or checkpoint.export_at_end=true in its place"
        )
    elif every is not None and every % interval:
        yield (
            f"checkpoint.export_every: {every} is no multiple of checkpoint.save_interval ({interval}), and an export "
            f"is made of a checkpoint; write {interval * max(1, round(every / interval))}"
        )


RULES: tuple[Rule, ...] = (
    _names,
    *MODEL_RULES,
    *LAYOUT_RULES,
    _data_forms,
    _split,
    _sequences,
    _time_limit,
    _evaluation,
    _learning_rate,
    _wsd,
    _precision,
    _checkpoints,
)
