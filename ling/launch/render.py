"""A job as the text of its job file: the launcher's template with its `{{names}}` filled in."""

from __future__ import annotations

import re
import shlex
from importlib import resources

from ling.config import UserError
from ling.launch.job import Job, job_seconds, stop_before_seconds

_NAME = re.compile(r"\{\{(\w+)\}\}")
_PORT = 29400

_REQUEUE = """\
case $ANSWER in
    done*) exit 0 ;;
    again*) scontrol requeue "$SLURM_JOB_ID" ;;
    exclude*) # only a waiting job can be told to keep off nodes: hold it, tell it, release it
        BAD=$(cut -d: -f2 <<<"$ANSWER" | tr -d ' ')
        OLD=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%x | grep -v null)
        scontrol requeuehold "$SLURM_JOB_ID"
        scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="$BAD${OLD:+,$OLD}"
        scontrol release "$SLURM_JOB_ID" ;;
    *) exit 1 ;;
esac
exit 75"""
_ARRAY = """\
case $ANSWER in
    done*) scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; exit 0 ;; # the rest of the array has nothing to do
    again*) exit 75 ;;                                              # the next job of the array goes on
    exclude*)
        scontrol update jobid="$SLURM_ARRAY_JOB_ID" ExcNodeList="$(cut -d: -f2 <<<"$ANSWER" | tr -d ' ')"
        exit 75 ;;
    *) scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; exit 1 ;;
esac"""
_NEVER = """\
case $ANSWER in
    done*) exit 0 ;;
    again*) exit 75 ;;
    *) exit 1 ;;
esac"""
_BRING_BACK = (
    '[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%r)" = TimeLimit ] && scontrol requeue "$SLURM_JOB_ID"'
)


def render(job: Job) -> str:
    """The job file's text.

    Raises:
        UserError: a value cannot stand in a job file.
    """
    values = _common(job) | {"slurm": _slurm, "torchrun": _torchrun, "local": _local}[job.kind](job)
    template = resources.files("ling.launch").joinpath(f"templates/{job.kind}.sh").read_text()
    return fill(template, values)


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its names replaced; a line that is nothing but an empty value disappears. A value of several
    lines keeps the indentation of its name."""
    lines = []
    for line in template.splitlines():
        alone = _NAME.fullmatch(line.strip())
        if alone is not None:
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + part if part else part for part in values[alone[1]].splitlines()]
        else:
            lines.append(_NAME.sub(lambda found: values[found[1]], line).rstrip())
    return "\n".join(lines) + "\n"


def _common(job: Job) -> dict[str, str]:
    name, cluster = job.config.run.name, job.cluster
    several = f"{job.nodes} node{'s' * (job.nodes > 1)} x {job.nproc} rank{'s' * (job.nproc > 1)}"
    gpus = f" --gpus {job.nproc if job.uses_gpus else 0}"
    if job.kind == "local" and job.config.runtime.platform == "auto":
        gpus = ""  # whatever there is
    return {
        "title": f"{name}: {several}" + (f" on {cluster.name}" if job.kind == "slurm" else ""),
        "command": job.command,
        "run_dir": _word(str(job.run_dir), "run.dir"),
        "nproc": str(job.nproc),
        "setup": (cluster.setup or "").strip(),
        "environment": "\n".join(_exports(cluster.environment)),
        "torchrun_options": _numa(job),
        "gpus": gpus,
        "free_gb": f"--free-gb {job.min_free_gb:.0f}",
        "arguments": shlex.join([job.config_path, *job.overrides]),
        "max_failures": str(job.config.launch.max_failures),
        "wrap": _wrap(job),
    }


def _slurm(job: Job) -> dict[str, str]:
    launch, restart = job.config.launch, job.config.launch.restart
    limit = job_seconds(job.config, job.cluster)
    is_array = restart == "array"
    restart_options = {
        "requeue": ["--requeue", "--dependency=singleton"],
        "array": [f"--array=1-{launch.array_size}%1", "--no-requeue"],
        "never": ["--no-requeue", "--dependency=singleton"],
    }[restart]
    return {
        "name": _word(job.config.run.name, "run.name"),
        "nodes": str(job.nodes),
        "options": "\n".join(f"#SBATCH {option}" for option in _options(job)),
        "time_limit": f"#SBATCH --time={_clock(limit)}" if limit is not None else "",
        "stop_before_s": str(stop_before_seconds(job.config)),
        "restart_options": "\n".join(f"#SBATCH {option}" for option in restart_options),
        "output": _word(f"{job.run_dir}/job/slurm-{'%A_%a' if is_array else '%j'}.out", "run.dir"),
        "start": "$SLURM_ARRAY_TASK_ID" if is_array else "${SLURM_RESTART_COUNT:-0}",
        "job": "$SLURM_ARRAY_JOB_ID" if is_array else "$SLURM_JOB_ID",
        "bring_back": _BRING_BACK if restart == "requeue" else "",
        "srun_options": _pyxis(job),
        "what_now": {"requeue": _REQUEUE, "array": _ARRAY, "never": _NEVER}[restart],
    }


def _torchrun(job: Job) -> dict[str, str]:
    return {"hosts": " ".join(job.hosts), "port": str(_PORT)}


def _local(job: Job) -> dict[str, str]:
    return {}


def _options(job: Job) -> list[str]:
    """sbatch's options for the machines and the account."""
    slurm = job.cluster.slurm
    gpus = slurm.gpu_option or f"gpus-per-node={job.cluster.node.gpus}"
    found = [f"--{gpus}"] if job.uses_gpus else []
    found += ["--exclusive", "--mem=0"]
    site = {name: getattr(slurm, name) for name in ("partition", "account", "qos", "constraint")} | slurm.options
    found += [f"--{name}={value}" if value else f"--{name}" for name, value in site.items() if value is not None]
    for option in found:
        if not re.fullmatch(r"--[a-z][\w-]*(=\S+)?", option):
            raise UserError(f"slurm.options: {option!r} is no option of sbatch; write name: value, without spaces")
    return found


def _clock(seconds: float) -> str:
    """Seconds as SLURM writes them, rounded up to minutes."""
    minutes = -(-int(seconds) // 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


def _exports(environment: dict[str, str]) -> list[str]:
    for name in environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"environment: {name!r} is no name of a variable; write NAME: value")
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def _numa(job: Job) -> str:
    binding = job.cluster.node.numa_binding
    return f" --numa-binding={binding}" if binding is not None and job.uses_gpus else ""


def _pyxis(job: Job) -> str:
    image, slurm = job.config.launch.container, job.cluster.slurm
    if image is None or slurm.container_runtime != "pyxis":
        return ""
    mounts = f'"$PWD:$PWD{"," + slurm.container_mounts if slurm.container_mounts else ""}"'
    return f' --container-image={shlex.quote(image)} --container-mounts={mounts} --container-workdir="$PWD"'


def _wrap(job: Job) -> str:
    """What runs a command in an apptainer image, with a space at its end; or nothing."""
    image, slurm = job.config.launch.container, job.cluster.slurm
    if image is None or slurm.container_runtime != "apptainer":
        return ""
    gpus = "--nv " if job.uses_gpus else ""
    bind = f"--bind {shlex.quote(slurm.container_mounts)} " if slurm.container_mounts else ""
    return f'apptainer exec {gpus}{bind}--bind "$PWD" --pwd "$PWD" {shlex.quote(image)} '


def _word(text: str, key: str) -> str:
    """A text that a #SBATCH line and the shell both take as one word."""
    if not re.fullmatch(r"[\w./%@+=:,-]+", text):
        raise UserError(f"{key}: {text!r} cannot stand in a job file; use letters, digits, and . _ - / only")
    return text
