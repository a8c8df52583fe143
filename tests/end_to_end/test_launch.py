"""The launch files: shell that parses, YAML with the fields its readers ask for, `trivium run` by torchrun in each."""

import os
import re
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
yaml = pytest.importorskip("yaml")


def document(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


def shell_check(script: str) -> None:
    """Raise unless bash can parse `script`."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_slurm_runs_one_torchrun_a_node_with_the_options_it_got(tmp_path):
    """With srun and scontrol that only show what they are asked, the command has the job's nodes, GPUs and head."""
    script = LAUNCH / "slurm.sh"
    shell_check(script.read_text())
    assert os.access(script, os.X_OK)
    for name, body in {"srun": 'echo "srun $OMP_NUM_THREADS $*"', "scontrol": 'printf "node7\\nnode8\\n"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "20005",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
    }
    command = [str(script), "recipes/mine.toml", "--workspace", "/shared/a folder"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "srun 8 --kill-on-bad-exit=1 python3 -m torch.distributed.run --nnodes 2 --nproc-per-node 4 --rdzv-id 20005 "
        "--rdzv-backend c10d --rdzv-endpoint node7:20005 -m trivium run recipes/mine.toml --workspace /shared/a folder"
    )
    empty = subprocess.run([str(script)], env=environment, capture_output=True, text=True, check=False)
    assert empty.returncode == 2 and "usage: sbatch" in empty.stderr


def test_slurm_asks_for_a_task_a_node_and_a_signal_before_the_end():
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"].startswith("TERM@")
    assert "requeue" in asked


def test_kubernetes_is_a_train_job_that_runs_trivium():
    job = document("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["command"][:4] == ["torchrun", "-m", "trivium", "run"]
    assert str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert all(isinstance(each["value"], str) for each in trainer["env"]), "Kubernetes takes strings alone"
    (override,) = job["spec"]["podTemplateOverrides"]
    mounts = {mount["name"] for mount in override["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in override["spec"]["volumes"]}
    assert override["spec"]["terminationGracePeriodSeconds"] >= 120


def test_skypilot_is_a_task_whose_shell_parses_and_runs_trivium():
    task = document("skypilot.yaml")
    assert task["resources"]["accelerators"] == "H100:8"
    shell_check(task["setup"])
    shell_check(task["run"])
    assert "-m torch.distributed.run" in task["run"]
    assert '-m trivium run "$RECIPE"' in task["run"]
    assert all(name in task["run"] for name in ("NUM_NODES", "NODE_RANK", "NUM_GPUS_PER_NODE", "NODE_IPS"))
    assert (LAUNCH.parent / task["envs"]["RECIPE"]).is_file()
