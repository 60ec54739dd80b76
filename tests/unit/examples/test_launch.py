"""The launcher and the examples over it: where its settings come from, and that every step is a command that exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_prune.__main__ import VERBS
from megatron_prune.command_line import parse
from megatron_prune.config import PruneConfig
from megatron_prune.decision.target import NM
from megatron_prune.jobs.plan import GIB, Job, plan
from megatron_prune.model.families import family_of
from megatron_prune.verbs.import_hf import ImportConfig

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "tools" / "launch.sh"
STEPS = "import preprocess prior learn trim export evaluate".split()
ONE_PROCESS = "import preprocess trim export evaluate".split()
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
SIZES = {
    "llama2_7b_maskllm": (32, 4096, 11008, 32, 32, 32000, "float16"),
    "llama2_13b_maskllm": (40, 5120, 13824, 40, 40, 32000, "float16"),
    "llama3_8b_maskllm": (32, 4096, 14336, 32, 8, 128256, "bfloat16"),
    "llama3.1_8b_maskllm": (32, 4096, 14336, 32, 8, 128256, "bfloat16"),
}
"""Of config.json, in the order of `SIZE_KEYS`, as the hub has it."""
SIZE_KEYS = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads vocab_size torch_dtype"
).split()
EXAMPLES = sorted(path.parent.name for path in ROOT.glob("examples/*/launch.sh"))


def run(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script with nothing of this machine's schedulers or GPUs in sight; `PATH` may be given."""
    basic = {"PATH": os.environ["PATH"], "PYTHON": "python", "NPROC_PER_NODE": "2"}
    return subprocess.run([str(script), *words], capture_output=True, text=True, env={**basic, **environment})


def command(script: Path, *words: str, **environment: str) -> list[str]:
    """The words that --dry-run prints, without the settings in front."""
    done = run(script, *words, **environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = shlex.split(line)
    return found[found.index("python") :]


def flag(words: list[str], name: str) -> str:
    """Value of a flag of torchrun."""
    return words[words.index(name) + 1]


def test_one_node_needs_no_address() -> None:
    words = command(LAUNCH, "--dry-run", "inspect", "--input", "a b")
    assert words[:3] == ["python", "-m", "torch.distributed.run"] and "--standalone" in words
    assert words[-5:] == ["-m", "megatron_prune", "inspect", "--input", "a b"]
    assert (flag(words, "--nproc-per-node"), flag(words, "--max-restarts")) == ("2", "0")


def test_flags() -> None:
    flags = "--nnodes=8 --node-rank 3 --master-addr head --master-port 1234 --nproc-per-node 4 --local-addr me".split()
    done = run(LAUNCH, "--dry-run", *flags, "--interface", "ib0", "prune", "--restartable")
    words = shlex.split(done.stdout)
    assert {"GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=ib0"} <= set(words)
    assert flag(words, "--rdzv-endpoint") == "head:1234" and "is_host=0" in flag(words, "--rdzv-conf")
    assert [flag(words, name) for name in ("--nnodes", "--nproc-per-node", "--local-addr")] == ["8", "4", "me"]
    assert flag(words, "--max-restarts") == "3", "a run that can go on is started again"


def test_only_node_0_keeps_the_store() -> None:
    words = command(LAUNCH, "--dry-run", "--nnodes", "2", "--master-addr", "head", "prune", NODE_RANK="0")
    assert "is_host=1" in flag(words, "--rdzv-conf")


def test_kubernetes() -> None:
    environment = {"JOB_COMPLETION_INDEX": "5", "NNODES": "8", "MASTER_ADDR": "job-0.job", "LOCAL_ADDR": "10.0.0.5"}
    words = command(LAUNCH, "--dry-run", "prune", **environment)
    assert flag(words, "--rdzv-endpoint") == "job-0.job:29500" and flag(words, "--local-addr") == "10.0.0.5"
    assert "is_host=0" in flag(words, "--rdzv-conf")


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, "8"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "4"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
        ({"MEGATRON_PRUNE_DEVICE": "cpu"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "4,5", "NPROC_PER_NODE": "3"}, "3"),
    ],
)
def test_a_process_for_each_gpu_that_may_be_seen(tmp_path: Path, environment: dict[str, str], processes: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor n in 0 1 2 3 4 5 6 7; do echo GPU $n: NVIDIA H100; done\n")
    program.chmod(0o755)
    base = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC_PER_NODE": ""}
    assert flag(command(LAUNCH, "--dry-run", "prune", **base | environment), "--nproc-per-node") == processes


def slurm(tmp_path: Path) -> dict[str, str]:
    """SLURM's variables on the second of three nodes, and its `scontrol`."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    program.chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "3",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "n[1-3]",
    }


def test_slurm(tmp_path: Path) -> None:
    words = command(LAUNCH, "--dry-run", "prune", **slurm(tmp_path))
    assert flag(words, "--rdzv-endpoint") == "n1:29500" and flag(words, "--rdzv-id") == "77"
    assert (flag(words, "--nnodes"), flag(words, "--nproc-per-node")) == ("3", "8")
    words = command(LAUNCH, "--dry-run", "--nnodes", "2", "--master-addr", "mine", "prune", **slurm(tmp_path))
    assert flag(words, "--rdzv-endpoint") == "mine:29500" and flag(words, "--nnodes") == "2"


def test_slurm_in_a_container_without_scontrol(tmp_path: Path) -> None:
    """The batch script asks on the host; `srun` here starts its command where there is no `scontrol`, as pyxis does."""
    environment, container = slurm(tmp_path), tmp_path / "container"
    container.mkdir()
    for tool in ("bash", "dirname", "env"):
        (container / tool).symlink_to(shutil.which(tool) or tool)
    inside = {**environment, "PATH": str(container)}
    assert "no --master-addr" in run(LAUNCH, "--dry-run", "prune", **inside).stderr
    words = command(LAUNCH, "--dry-run", "prune", **inside, MASTER_ADDR="n1")
    assert flag(words, "--rdzv-endpoint") == "n1:29500"

    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nPATH={container} exec "$@"\n')
    srun.chmod(0o755)
    batch = {**environment, "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": shutil.which("echo") or "echo"}
    script = ["bash", "docker/slurm.sbatch"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=batch)
    assert done.returncode == 0, done.stderr
    assert flag(done.stdout.split(), "--rdzv-endpoint") == "n1:29500"


def test_slurm_with_a_task_for_every_gpu(tmp_path: Path) -> None:
    done = run(LAUNCH, "--dry-run", "prune", **slurm(tmp_path), SLURM_LOCALID="1")
    assert done.returncode == 2 and "--ntasks-per-node=1" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no verb"),
        ("--nnodes", "--nnodes needs a value"),
        ("--nnodes two prune", "--nnodes two was given; allowed: a whole number"),
        ("--nnodes 0 prune", "--nnodes 0 was given; allowed: 1 or more"),
        ("--nnodes 2 --node-rank 2 --master-addr a prune", "--node-rank 2 was given; allowed: 0 to 1"),
        ("--nnodes 2 prune", "no --master-addr"),
        ("--master-port 65536 prune", "allowed: 1 to 65535"),
        ("--max-restarts -1 prune", "--max-restarts -1 was given"),
        ("--node_rank 0 prune", "unknown option --node_rank"),
    ],
)
def test_mistakes_are_one_line(words: str, message: str) -> None:
    done = run(LAUNCH, *words.split())
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_the_examples_are_those_with_sizes() -> None:
    assert sorted(SIZES) == EXAMPLES


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_step_is_a_command_that_the_package_reads(example: str, step: str) -> None:
    words = command(ROOT / "examples" / example / "launch.sh", step, "--dry-run")
    verb, *rest = words[words.index("megatron_prune") + 1 :]
    config = parse(VERBS[verb].config, rest, verb)
    if isinstance(config, PruneConfig):
        assert config.target == "2:4" and config.method == {"prior": "sparsegpt", "learn": "maskllm"}[step]
    if isinstance(config, ImportConfig):
        assert config.dtype == "bfloat16", "the hub has LLaMA-2 as float16"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_steps_for_one_process_start_one(example: str, step: str) -> None:
    words = command(ROOT / "examples" / example / "launch.sh", step, "--dry-run", NPROC_PER_NODE="8")
    assert flag(words, "--nproc-per-node") == ("1" if step in ONE_PROCESS else "8")


@pytest.mark.parametrize("example", EXAMPLES)
def test_steps_pass_options_and_flags_on(example: str) -> None:
    options = "--dry-run --nnodes 8 --node-rank 1 --master-addr n0 --nproc-per-node 8 -- --train-iters 10".split()
    words = command(ROOT / "examples" / example / "launch.sh", "learn", *options)
    assert flag(words, "--nnodes") == "8" and words[-2:] == ["--train-iters", "10"]
    config = parse(PruneConfig, words[words.index("prune") + 1 :], "prune")
    assert config.training.num_microbatches(config.parallelism.data_parallel_size(64)) == 32
    done = run(ROOT / "examples" / example / "launch.sh", "lern")
    assert done.returncode == 2 and "allowed: import preprocess prior learn" in done.stderr


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_memory_in_the_readme_is_what_plan_says(example: str) -> None:
    recipe = ROOT / "examples" / example / "learn.yaml"
    hf = LLAMA | dict(zip(SIZE_KEYS, SIZES[example], strict=True))
    page = (recipe.parent / "README.md").read_text()
    large = re.search(r"learn -- (.*?)`.*?by plan: ([\d.]+) GiB", page, re.DOTALL)
    stated = re.search(r"predicted: ([\d.]+) GiB", page)
    assert stated is not None and (large is not None or "13b" in example)
    for flags, gib in [([], stated[1]), *([(large[1].split(), large[2])] if large else [])]:
        config = parse(PruneConfig, ["--config", str(recipe), "--input", "a", "--output", "b", *flags], "prune")
        replicas = 8 // config.parallelism.tensor_model_parallel_size
        (stage,) = plan(
            Job(family_of(hf).from_hf(hf), config.parallelism, config.training, NM(2, 4), replicas=replicas)
        )
        assert float(gib) == round(stage.total / GIB, 1)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has GPUs to count")
def test_without_gpus_one_process() -> None:
    words = command(LAUNCH, "--dry-run", "methods", NPROC_PER_NODE="")
    assert flag(words, "--nproc-per-node") == "1"
