"""tools/launch/: what the scripts start, and that one machine's failure or a time limit ends or requeues the run.

ssh, srun and scontrol are stand-ins that run on this machine; torchrun is a script that writes down its arguments.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "launch"


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """A folder at the front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def start(tmp_path: Path, *command: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("name", ["ssh.sh", "slurm.sbatch"])
def test_parses_and_says_how_it_is_used(tmp_path, name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    run = subprocess.run(["bash", FOLDER / name], capture_output=True, text=True)
    assert run.returncode == 2 and "CONFIG [key=value ...]" in run.stderr


def test_ssh_starts_one_torchrun_a_machine_with_the_config_and_overrides(tmp_path, bin):
    script(bin / "ssh", 'host=$2; shift 2; HOST=$host bash -c "$*"')
    python = script(tmp_path / "python", 'printf "%s|" "$HOST" "$PWD" "$@" >> calls.txt; echo >> calls.txt')
    (tmp_path / "hosts.txt").write_text("node-a\n# spare: node-x\n\nnode-b  # 8 GPUs\n")
    run = start(tmp_path, FOLDER / "ssh.sh", "hosts.txt", "a b.yaml", "x.y=[1, 2]", PYTHON=str(python), PROCESSES="8")
    output = run.communicate(timeout=20)[0].decode()
    assert run.returncode == 0, output
    calls = sorted(line.split("|") for line in (tmp_path / "calls.txt").read_text().splitlines())
    assert [call[:2] for call in calls] == [["node-a", str(tmp_path)], ["node-b", str(tmp_path)]]
    for call in calls:
        assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node-a:29500"} <= set(call)
        assert call[-6:] == ["-m", "mmoe", "train", "a b.yaml", "x.y=[1, 2]", ""]
    assert calls[0][2:] == calls[1][2:]  # one rendezvous


def test_ssh_ends_all_machines_when_one_fails(tmp_path, bin):
    script(bin / "ssh", 'host=$2; shift 2; HOST=$host bash -c "$*"')
    python = script(tmp_path / "python", '[ "$HOST" = node-a ] && exit 7; sleep 60 & trap "kill $!; exit 3" TERM; wait')
    (tmp_path / "hosts.txt").write_text("node-a\nnode-b\n")
    run = start(tmp_path, FOLDER / "ssh.sh", "hosts.txt", "c.yaml", PYTHON=str(python))
    run.communicate(timeout=20)
    assert run.returncode == 7  # the failure, not the end that it made


def slurm(tmp_path: Path, bin: Path, *options: str, torchrun: str, config: str = "exit 0") -> subprocess.Popen:
    """`torchrun` and `config` are what these two commands do; what was called is in calls.txt."""
    script(bin / "srun", 'shift; exec "$@"')
    script(bin / "scontrol", 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; else echo "$*" > requeued.txt; fi')
    does = f'case "$3" in config) {config};; doctor) exit 0;; esac'
    noted = 'echo "$@" >> calls.txt; echo "$SRUN_CPUS_PER_TASK $NCCL_DEBUG" > variables.txt'
    python = script(tmp_path / "python", f"{noted}; {does}; {torchrun}")
    names = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
    names |= {"SLURM_CPUS_PER_TASK": "12"}
    return start(tmp_path, "bash", FOLDER / "slurm.sbatch", "c.yaml", "a=1", *options, PYTHON=str(python), **names)


@pytest.mark.parametrize("code", [0, 5])
def test_slurm_ends_as_its_run_ends(tmp_path, bin, code):
    run = slurm(tmp_path, bin, "--stop-after", "9", "--set", "b=2", torchrun=f"exit {code}")
    output = run.communicate(timeout=20)[0].decode()
    assert run.returncode == code, output
    *before, call = (tmp_path / "calls.txt").read_text().splitlines()
    assert before == ["-m mmoe doctor", "-m mmoe config c.yaml a=1 b=2"]
    assert (tmp_path / "variables.txt").read_text() == "12 WARN\n"
    assert "--nnodes=2 --nproc-per-node=8" in call and "--rdzv-endpoint=node-a:29500 --rdzv-id=17.0" in call
    assert call.endswith("-m mmoe train c.yaml a=1 --stop-after 9 --set b=2")
    assert not (tmp_path / "requeued.txt").exists()


def test_slurm_starts_nothing_where_the_config_cannot_run(tmp_path, bin):
    run = slurm(tmp_path, bin, torchrun="exit 0", config="exit 2")
    output = run.communicate(timeout=20)[0].decode()
    assert run.returncode == 2 and "the config cannot run" in output
    assert "torch.distributed.run" not in (tmp_path / "calls.txt").read_text()
    assert not (tmp_path / "requeued.txt").exists()


def test_slurm_gives_a_task_the_whole_memory_of_its_machine():
    assert "\n#SBATCH --mem=0\n" in (FOLDER / "slurm.sbatch").read_text()


def test_slurm_saves_and_requeues_at_the_time_limit(tmp_path, bin):
    saved = 'trap "sleep 1; touch saved; exit 1" TERM; touch started; while true; do sleep 0.1; done'
    run = slurm(tmp_path, bin, torchrun=saved)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    run.send_signal(signal.SIGUSR1)
    output = run.communicate(timeout=20)[0].decode()
    assert run.returncode == 0, output
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued.txt").read_text() == "requeue 17\n"
