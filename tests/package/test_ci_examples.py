"""The files in examples/ci, as far as they run without GitHub, Hugging Face and Slurm, with stand-ins for commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "ci"


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **more}


def test_the_workflow_needs_no_secret() -> None:
    text = (FOLDER / "github-actions.yml").read_text()
    workflow = yaml.safe_load(text)
    assert "secrets." not in text
    assert workflow["permissions"] == {"contents": "read", "id-token": "write"}
    job = workflow["jobs"]["convert"]
    assert job["env"]["HF_OIDC_RESOURCE"].count("/") == 1
    assert any("df11 job run --json job.toml" in step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize(
    ("codes", "end", "runs"), [([0], 0, 1), ([5, 0], 0, 2), ([5, 5, 5], 5, 3), ([7], 7, 1), ([5, 1], 1, 2)]
)
def test_the_workflow_tries_again_only_where_that_helps(tmp_path: Path, codes: list[int], end: int, runs: int) -> None:
    steps = yaml.safe_load((FOLDER / "github-actions.yml").read_text())["jobs"]["convert"]["steps"]
    script = next(step["run"] for step in steps if "job run" in step.get("run", ""))
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    stand_in(tmp_path, "df11", 'echo "$@" >> calls; read code < codes; sed -i 1d codes; exit "$code"')
    stand_in(tmp_path, "sleep", "")
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment(tmp_path), check=False)
    assert done.returncode == end
    assert (tmp_path / "calls").read_text().splitlines() == ["job run --json job.toml"] * runs


def test_hugging_face_jobs(tmp_path: Path) -> None:
    stand_in(tmp_path, "hf", f'printf "%s\\n" "$@" > {tmp_path}/call')
    (tmp_path / "my job.toml").write_text("")
    subprocess.run([FOLDER / "hf-jobs.sh", tmp_path / "my job.toml"], env=environment(tmp_path), check=True)
    call = (tmp_path / "call").read_text().splitlines()
    assert call[:2] == ["jobs", "run"]
    assert f"{tmp_path}:/job" in call
    assert call[call.index("--secrets") + 1] == "HF_TOKEN"  # By name: the value is nowhere in the command.
    assert call[-1].endswith("df11 job run --json /job/my\\ job.toml")


def start_slurm(tmp_path: Path, task: int) -> subprocess.Popen[bytes]:
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    for name in ("a", "b"):
        (jobs / f"{name}.toml").write_text("")
    stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/requeued')
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
    return subprocess.Popen([FOLDER / "slurm-array.sh", jobs], env=environment(tmp_path, **variables))


@pytest.mark.parametrize(("code", "again"), [(0, False), (5, True), (7, False)])
def test_slurm_runs_one_job_file_a_task(tmp_path: Path, code: int, again: bool) -> None:
    stand_in(tmp_path, "df11", f'echo "$@"; exit {code}')
    assert start_slurm(tmp_path, 1).wait(60) == code
    assert (tmp_path / "jobs" / "b.jsonl").read_text() == f"job run --json {tmp_path}/jobs/b.toml\n"
    assert (tmp_path / "requeued").exists() is again


def test_slurm_hands_the_signal_on_and_queues_the_task_again(tmp_path: Path) -> None:
    stand_in(
        tmp_path,
        "df11",
        f"trap 'echo stopped; exit 130' TERM; touch {tmp_path}/started; while true; do sleep 0.05; done",
    )
    process = start_slurm(tmp_path, 0)
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert (tmp_path / "jobs" / "a.jsonl").read_text() == "stopped\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7_0\n"
