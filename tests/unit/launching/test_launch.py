"""`torchtitan launch`: what is rendered, submitted and refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from harness import command
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from torchtitan.errors import ConfigError
from torchtitan.launching.command import main
from torchtitan.launching.job import seconds_of
from torchtitan.protocols.train_spec import get_train_spec

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted(path.name for path in (ROOT / "launchers").iterdir() if path.suffix != ".md")
JOB = """\
[model]
flavor = "debugmodel" # it's "quoted", $HOME and $(HOME)
tokenizer_path = "/only/on/the/cluster"

[training]
seq_len = 256
dataset = "c4"

[checkpoint]
enable = true
initial_load_path = "/only/on/the/cluster"
"""
KINDS = {
    "slurm": ["--slurm"],
    "job": ["--kubernetes", "--image=me/titan:1"],
    "jobset": ["--kubernetes", "--image=me/titan:1", "--kind=jobset"],
    "pytorchjob": ["--kubernetes", "--image=me/titan:1", "--kind=pytorchjob"],
    "skypilot": ["--skypilot"],
    "ssh": ["--ssh", "--hosts=a,b"],
}


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "my job.toml"
    path.write_text(JOB)
    return str(path)


def render(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_the_command_renders(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "launchers" / name).read_text()
    words = shlex.split(re.search("^# Rendered by: (.*)$", text, re.MULTILINE)[1])
    assert words[:2] == ["torchtitan", "launch"]
    assert render(capsys, *words[2:]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_runs_the_job_as_it_is_written(
    kind: str, job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script of a host is run, with a Python that only shows what it was told."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nenv | grep ^GREETING\ncat "${@: -2:1}"\n')
    python.chmod(0o755)
    options = ["--nodes=2", f"--python={python}", "--dry-run"]
    greeting = "it's $HOME $$ $(NCCL_DEBUG) 😀"
    options += [f"--env=GREETING={greeting}"]
    text = render(capsys, job, *KINDS[kind], *options, "--", "--training.steps=7")
    script, environment = script_of(kind, text)
    bash = ["bash", "-c", script]
    env = os.environ | {"TMPDIR": str(tmp_path)} | environment
    out = subprocess.run(bash, env=env, capture_output=True, text=True, check=True).stdout
    assert f"GREETING={greeting}\n" in out
    assert out.endswith(JOB)
    words = out.splitlines()
    for name, value in {
        "--nnodes": "2",
        "--nproc-per-node": "8",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "head:1234",
        "--local-addr": "head",
        "-m": "torchtitan.runtime.torchrun",
    }.items():
        assert words[words.index(name) + 1] == value
    seconds = 86400 if "--kubernetes" in KINDS[kind] else 900
    assert f"is_host=1,join_timeout={seconds}" in words
    assert "--training.steps=7" in words
    assert ("138" in words) == (kind == "pytorchjob")


@pytest.mark.long
def test_many_hosts_send_heartbeats_less_often_and_not_at_once(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By options that torchrun reads. A host is not taken for dead before it misses two."""
    text = render(capsys, "--slurm", job, "--nodes=1250", "--dry-run")
    word = re.search('--rdzv-conf ("[^"]*")', text)[1]
    out = subprocess.run(
        ["bash", "-c", f"for index in {{0..99}}; do echo {word}; done"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    intervals = []
    for line in out.split():
        options = dict(pair.split("=") for pair in line.split(","))
        parameters = RendezvousParameters("c10d", "head", "job", 1250, 1250, None, **options)
        handler = create_handler(HashStore(), SimpleNamespace(name="c10d"), parameters)
        assert handler.settings.keep_alive_max_attempt == 3
        intervals.append(handler.settings.keep_alive_interval.total_seconds())
    assert len(set(intervals)) == 27 and min(intervals) == 78
    assert 2 * max(intervals) < 3 * min(intervals)
    assert "keep_alive" not in render(capsys, "--slurm", job, "--nodes=100", "--dry-run")


def script_of(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """The function `node` called as the first host's, and what the scheduler would set."""
    if kind in ("slurm", "ssh"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        return f"{text[text.index('node()') : text.index(chr(10) + '}') + 2]}\nnode 0 head 1234", {}
    *_, document = yaml.safe_load_all(text)
    if kind == "skypilot":
        return document["run"].rpartition("node ")[0] + "node 0 head 1234", document["envs"]
    if kind == "pytorchjob":
        template = document["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    elif kind == "jobset":
        template = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    else:
        template = document["spec"]["template"]
    container = template["spec"]["containers"][0]
    variables: dict[str, str] = {}

    def expand(text: str) -> str:
        """What Kubernetes does to arguments, and to variables with those before them."""
        return re.sub(
            r"\$\$|\$\((\w+)\)",
            lambda found: "$" if found[1] is None else variables.get(found[1], found[0]),
            text,
        )

    for item in container["env"]:
        variables[item["name"]] = expand(item["value"])
    script = expand(container["args"][0])
    return script.rpartition("node ")[0] + "node 0 head 1234", variables


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_stands_in_a_comment_of_one_line(
    kind: str, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    description = 'it\'s\n"two" \\ lines\t#'
    words = [job, *KINDS[kind], "--dry-run", "--", "--job.description", description]
    text = render(capsys, *words)
    script_of(kind, text)
    rendering = re.search("^# Rendered by: (.*)$", text, re.MULTILINE)[1]
    bash = ["bash", "-c", f"printf '%s\\0' {rendering}"]
    read = subprocess.run(bash, capture_output=True, text=True, check=True).stdout
    assert read.split("\0")[2:-1] == words


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("slurm", "ssh")])
def test_names_are_texts_in_yaml(kind: str, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        ["--name=no", "--env=ON=1"]
        if kind == "skypilot"
        else ["--name=no", "--env=ON=1", "--namespace=123"]
    )
    for document in yaml.safe_load_all(render(capsys, job, *KINDS[kind], *options, "--dry-run")):
        if kind == "skypilot":
            assert document["name"] == "no"
        else:
            assert document["metadata"] == {"name": "no", "namespace": "123"}
    if kind != "skypilot":
        assert script_of(kind, yaml.safe_dump(document))[1]["ON"] == "1"


@pytest.mark.parametrize("character", ["\u2028", "\u0085"])
def test_a_file_that_no_script_can_hold_is_refused(character: str, job: str) -> None:
    Path(job).write_text(f'{JOB}\n[job]\ndescription = "Llama{character}3"\n')
    code = f"{ord(character):04x}"
    with pytest.raises(ConfigError, match=rf'job.toml:14: .*U\+{code.upper()} .*"\\u{code}"'):
        main([job, "--slurm", "--dry-run"])


def test_a_file_that_is_too_long_for_a_command_line_is_refused(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(job).write_text(JOB + f"# {'x' * 100}\n" * 1100)
    script, _ = script_of("slurm", render(capsys, job, "--slurm", "--dry-run"))
    words = ["bash", "-c", script.replace("node 0 head 1234", "exit 7")]
    assert subprocess.run(words).returncode == 7
    Path(job).write_text(JOB + f"# {'x' * 100}\n" * 1300)
    with pytest.raises(ConfigError, match=r"job.toml: has 13\d,\d+ bytes; must be at most 120,000"):
        main([job, "--slurm", "--dry-run"])
    assert "x" * 100 in render(capsys, job, "--ssh", "--hosts=a", "--dry-run")


def test_slurm_has_what_its_users_set(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes=4", "--partition=gpu", "--account=me", "--qos=high", "--time=1-12"]
    options += ["--sbatch=constraint=h100", "--image=a/b:1", "--mount=/data:/data", "--grace=60"]
    options += ["--env=TOKENIZERS_PARALLELISM=false"]
    text = render(capsys, "--slurm", job, *options, "--dry-run")
    for line in (
        "job-name=my-job",
        "nodes=4",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "partition=gpu",
        "account=me",
        "qos=high",
        "time=1-12",
        "constraint=h100",
        "signal=USR1@60",
        "requeue",
    ):
        assert f"#SBATCH --{line}\n" in text
    assert "--container-image=a/b:1 --container-mounts=/data:/data" in text
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text
    assert "export TOKENIZERS_PARALLELISM=false" in text


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([], ["--exclusive", "--mem=0"]),
        (["mem-per-cpu=4G"], ["--exclusive", "--mem-per-cpu=4G"]),
        (["--cpus-per-task=16"], ["--cpus-per-task=16"]),
        (["cpus-per-gpu=12", "mem=100G"], ["--cpus-per-gpu=12", "--mem=100G"]),
    ],
)
def test_slurm_gives_whole_hosts_unless_the_user_shares_them(
    options: list[str], asked: list[str], job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--sbatch={option}" for option in options]
    text = render(capsys, "--slurm", job, *words, "--dry-run")
    found = re.findall("^#SBATCH (--(?:exclusive|mem|cpus).*)$", text, re.MULTILINE)
    assert found == asked


def test_what_the_user_says_to_sbatch_is_what_counts(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = render(capsys, "--slurm", job, "--sbatch=output=/logs/%j.log", "--dry-run")
    assert re.findall("^#SBATCH --output=(.*)$", text, re.MULTILINE)[-1] == "/logs/%j.log"


def test_srun_is_told_of_the_cpus(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpus in ("", "16"):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", cpus)
        done = batch(job, tmp_path / f"_{cpus}", capsys, [], 0, [])
        assert done.stdout == f"CPUs: {cpus}\n" if cpus else not done.stdout, done.stderr


# What srun ends with, the checkpoints that it leaves (one with .partial is not complete), and
# whether the job goes back into the queue. step-20 was there before.
ENDINGS = {
    "done": (0, ["40"], False),
    "mistake": (2, ["40"], False),
    "preempted": (75, [], True),
    "crashed": (1, ["30", "100"], True),
    "killed": (137, ["100"], True),
    "crashed at once": (1, [], False),
    "crashed as it saved": (1, ["30.partial"], False),
    "crashed after it went back": (1, ["10"], False),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_slurm_requeues_a_crash_that_got_further(
    ending: str, job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, saved, again = ENDINGS[ending]
    options = [f"--workdir={tmp_path}/my runs"]
    done = batch(job, tmp_path, capsys, options, code, saved)
    assert (done.returncode, done.stderr) == (code, "")
    assert (tmp_path / "requeued").exists() == again, done.stdout
    assert ("back into the queue" in done.stdout) == again
    if ending == "crashed":
        assert "crashed, but step 100 is saved" in done.stdout


@pytest.mark.parametrize(("refusals", "again"), [(2, True), (100, False)])
def test_slurm_asks_again_where_requeueing_fails(
    refusals: int,
    again: bool,
    job: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REFUSALS", str(refusals))
    done = batch(job, tmp_path, capsys, [f"--workdir={tmp_path}/my runs"], 75, [])
    assert done.returncode == 75
    assert (tmp_path / "requeued").exists() == again
    assert ("could not be requeued" in done.stdout) == (not again)


def test_slurm_says_that_a_run_which_was_told_to_end_is_not_requeued(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANCELS", "kill -TERM")
    done = batch(job, tmp_path, capsys, [f"--workdir={tmp_path}/my runs"], 75, [])
    assert not (tmp_path / "requeued").exists()
    assert "requeued only if it was preempted" in done.stdout and "--grace" in done.stdout


@pytest.mark.parametrize("where", ["the folder of submission", "a container"])
def test_slurm_finds_the_checkpoints(
    where: str, job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = []
    if where == "a container":
        (tmp_path / "my").mkdir()
        (tmp_path / "my" / "runs").symlink_to(tmp_path / "my runs")
        options = ["--image=a/b:1", f"--mount={tmp_path}/my:/data", "--workdir=/data/runs"]
    done = batch(job, tmp_path, capsys, options, 1, ["30"])
    assert (tmp_path / "requeued").read_text() == "17\n", done.stdout + done.stderr


def batch(
    job: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    saved: list[str],
    *overrides: str,
) -> subprocess.CompletedProcess[str]:
    """Runs the script in `folder`/my runs, where `srun` leaves checkpoints and ends with `code`."""
    root = folder / "my runs" / "out" / "checkpoint"
    (root / "step-20").mkdir(parents=True)
    (root / "step-20" / "manifest.json").write_text("{}")
    (root / "step-500").mkdir()  # no checkpoint
    steps = " ".join(saved)
    tell = '[ -z "${SRUN_CPUS_PER_TASK:-}" ] || echo "CPUs: $SRUN_CPUS_PER_TASK"'
    save = f'cd "{root}"; for n in {steps}; do cp -r step-20 "step-$n"; done'
    commands = {
        "scontrol": f"""\
[ "$1" = requeue ] || {{ echo host0; exit; }}
echo >>"{folder}/asked"
[ "$(wc -l <"{folder}/asked")" -gt "${{REFUSALS:-0}}" ] && echo "$2" >"{folder}/requeued\"""",
        "srun": f"{tell}\n{save}; ${{CANCELS:-:}} $PPID; exit {code}",
        "sleep": ":",
    }
    for name, line in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    words = ["--", "--job.dump_folder=./out", *overrides]
    text = render(capsys, "--slurm", job, *options, "--dry-run", *words)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_NNODES": "1"}
    env |= {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "host0"}
    return subprocess.run(
        ["bash", "-c", text], env=env, cwd=folder / "my runs", capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ([], ["--checkpoint.folder=memory://bucket/run"]),
        ([], ["--checkpoint.enable=false"]),
        (["--image=a/b:1"], []),
    ],
)
def test_slurm_looks_for_no_checkpoints_that_it_cannot_see(
    options: list[str], overrides: list[str], job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = render(capsys, "--slurm", job, *options, "--dry-run", "--", *overrides)
    assert "\ncheckpoints=/nonexistent\n" in text


POD, HOST = ["--kubernetes", "--image=a/b:1"], ["--skypilot", "--mount=s3://b:/out"]
BOX, MOUNTED = ["--slurm", "--image=a/b:1"], ["--mount=runs:/out"]
LOST = {
    "job": (POD, [], "outputs/checkpoint in each pod.*give --mount CLAIM:/PATH and -- --job.dump"),
    "jobset": ([*POD, "--kind=jobset"], [], "in each pod"),
    "pytorchjob": ([*POD, "--kind=pytorchjob"], [], "in each pod"),
    "beside the mount": ([*POD, *MOUNTED], ["--job.dump_folder=/output"], "/output/checkpoint in"),
    "spot": ([*HOST, "--spot"], [], "outputs/checkpoint on the disk of each host.*--checkpoint.fo"),
    "hosts": ([*HOST, "--nodes=2"], [], "on the disk of each host"),
    "container": (BOX, [], "outputs/checkpoint in each container.*give --mount /FOLDER:/PATH"),
}
KEPT = {
    "folder": ([*POD, *MOUNTED], ["--job.dump_folder=/out/mine"]),
    "workdir": ([*POD, *MOUNTED, "--workdir=/out"], []),
    "checkpoint.folder": ([*POD, *MOUNTED], ["--checkpoint.folder=/out/mine"]),
    "url": (POD, ["--checkpoint.folder=s3://b/mine"]),
    "url of spot": (
        [*HOST, "--spot"],
        ["--checkpoint.folder=s3://b/mine", "--job.dump_folder=/out/mine"],
    ),
    "one host": (HOST, []),
    "slurm": (["--slurm"], []),
    "mount of container": ([*BOX, "--mount=/lustre:/out"], ["--job.dump_folder=/out/mine"]),
    "url of container": (BOX, ["--checkpoint.folder=s3://b/mine"]),
}


@pytest.mark.parametrize("name", [*LOST, *KEPT])
def test_checkpoints_that_go_with_a_pod_or_a_host_are_warned_of(
    name: str, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options, overrides, warning = LOST[name] if name in LOST else (*KEPT[name], "")
    assert main([job, *options, "--dry-run", "--", *overrides]) == 0
    told = capsys.readouterr().err
    assert re.match(f"warning: checkpoints go to .*{warning}", told) if warning else not told, told


def test_a_job_without_checkpoints_is_warned_of_and_not_requeued(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([job, *POD, "--dry-run", "--", "--checkpoint.enable=false"])
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "checkpoint.enable is false" in told
    done = batch(job, tmp_path, capsys, [], 75, [], "--checkpoint.enable=false")
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")
    assert not (tmp_path / "requeued").exists()


def test_kubernetes_starts_preempted_pods_again_and_knows_secrets_by_name(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_shown")
    options = ["--image=a/b:1", "--nodes=2", "--secret=HF_TOKEN=hub/token", "--mount=data:/data"]
    options += ["--mount=/raid:/scratch", "--namespace=ml", "--node-selector=gpu=h100"]
    text = render(capsys, "--kubernetes", job, *options, "--time=90", "--dry-run")
    assert "hf_never_shown" not in text
    service, manifest = yaml.safe_load_all(text)
    assert service["spec"]["clusterIP"] == "None"
    assert manifest["metadata"] == {"name": "my-job", "namespace": "ml"} == service["metadata"]
    spec = manifest["spec"]
    assert spec["completions"] == spec["parallelism"] == 2
    assert spec["activeDeadlineSeconds"] == 5400
    actions = {rule["action"]: rule for rule in reversed(spec["podFailurePolicy"]["rules"])}
    assert actions["Ignore"]["onExitCodes"]["values"] == [75]
    assert actions["FailJob"]["onExitCodes"]["values"] == [2]
    # The meeting point goes with the first pod, so nobody waits for others once that one is done.
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 180 and pod["nodeSelector"] == {"gpu": "h100"}
    container = pod["containers"][0]
    reference = {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert {"name": "HF_TOKEN", "valueFrom": reference} in container["env"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {mounts[volume.pop("name")]: volume for volume in pod["volumes"]}
    assert volumes == {
        "/dev/shm": {"emptyDir": {"medium": "Memory"}},
        "/data": {"persistentVolumeClaim": {"claimName": "data"}},
        "/scratch": {"hostPath": {"path": "/raid"}},
    }


def test_a_jobset_starts_no_mistake_again(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = render(capsys, "--kubernetes", job, "--image=a/b:1", "--kind=jobset", "--dry-run")
    spec = yaml.safe_load(text)["spec"]
    pods = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert pods[0]["action"] == "FailJob" and pods[0]["onExitCodes"]["values"] == [2, 75]

    def action(code: int, reason: str = "PodFailurePolicy") -> str:
        """What JobSet does by the first rule that fits what Kubernetes says of the job."""
        message = (
            f"Container pytorch for pod default/my-job-node-0-2-x failed with exit code {code}"
        )
        message += " matching FailJob rule at index 0"
        rules = [r for r in spec["failurePolicy"]["rules"] if r["onJobFailureReasons"] == [reason]]
        patterns = [rule.get("onJobFailureMessagePatterns", [""]) for rule in rules]
        fits = (any(re.search(each, message) for each in of_rule) for of_rule in patterns)
        return next(rule["action"] for rule, fit in zip(rules, fits, strict=True) if fit)

    assert action(2) == "FailJobSet"
    assert action(75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(0, "DeadlineExceeded") == "FailJobSet"  # without a rule, JobSet would restart it


@pytest.mark.parametrize("kind", ["job", "jobset", "pytorchjob"])
def test_pods_wait_a_day_for_one_that_finds_no_host(
    kind: str, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """When they end, that counts as a crash of each."""
    options = ["--image=a/b:1", f"--kind={kind}", "--nodes=2"]
    assert "join_timeout=86400" in render(capsys, "--kubernetes", job, *options, "--dry-run")


def test_pytorchjobs_have_a_master_and_workers(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = render(capsys, job, *KINDS["pytorchjob"], "--nodes=3", "--dry-run")
    replicas = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]
    assert {role: replica["replicas"] for role, replica in replicas.items()} == {
        "Master": 1,
        "Worker": 2,
    }
    assert all(replica["restartPolicy"] == "ExitCode" for replica in replicas.values())


def test_ssh_sends_secrets_through_the_pipe(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for ssh runs the shell here, one for Python shows the variable."""
    for name, line in {"ssh": 'shift; exec "$@"', "python": "env | grep ^HF_TOKEN"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    options = ["--ssh", job, "--hosts=me@a,b", "--secret=HF_TOKEN", f"--python={tmp_path}/python"]
    text = render(capsys, *options, f"--ssh-command={tmp_path}/ssh", "--dry-run")
    env = {**os.environ, "HF_TOKEN": "it's $secret"}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "[b] HF_TOKEN=it's $secret",
        "[me@a] HF_TOKEN=it's $secret",
    ]
    del env["HF_TOKEN"]
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "HF_TOKEN: must be in the environment" in done.stderr


def test_ssh_tells_the_hosts_when_the_terminal_is_closed(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output goes to it, and that it fails then must not end the hosts' jobs.

    What tells them apart from another job of the same name is gone at the end.
    """
    home = tmp_path / "home"
    home.mkdir()
    saving = f"echo saving; sleep 0.3; echo saving; touch {tmp_path}/saved-$$; exit 75"
    going_on = "while :; do echo on; sleep 0.1; done"
    python = f"trap '{saving}' TERM; touch {tmp_path}/ready-$$; {going_on}"
    for name, line in {"ssh": 'shift; exec "$@"', "python": python}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    options = ["--ssh", job, "--hosts=a,b", f"--python={tmp_path}/python", "--name=closed-terminal"]
    text = render(capsys, *options, f"--ssh-command={tmp_path}/ssh", "--dry-run")
    terminal, end = os.openpty()
    command = ["bash", "-c", text]
    with subprocess.Popen(
        command, stdout=end, stderr=end, start_new_session=True, cwd=home
    ) as process:
        os.close(end)
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        names = [path.name for path in home.iterdir()]
        os.close(terminal)
        os.killpg(process.pid, signal.SIGHUP)
        try:
            assert process.wait(timeout=30) == 75
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert len([name for name in names if f"-{process.pid}-" in name]) == 2
    assert not list(home.iterdir())


SUBMITTED = {
    "slurm": ("sbatch", [], "#SBATCH"),
    "jobset": ("kubectl", ["create", "-f", "-"], "kind: JobSet"),
    "skypilot": ("sky", ["launch", "--cluster", "my-job", "--yes", "FILE"], "num_nodes"),
}


@pytest.mark.parametrize("kind", SUBMITTED)
def test_without_dry_run_the_tool_gets_it(
    kind: str, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, words, inside = SUBMITTED[kind]
    tool = tmp_path / "bin" / name
    tool.parent.mkdir()
    received = tmp_path / "received"
    read = 'cat "${@: -1}"' if "FILE" in words else "cat"
    tool.write_text(f'#!/bin/bash\n(printf "%s\\n" "$@"; {read}) >{received}\nexit 3\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    assert main([job, *KINDS[kind]]) == 3
    text = received.read_text()
    assert inside in text
    for word in words:
        assert word == "FILE" or f"{word}\n" in text


def test_a_kubernetes_job_that_exists_is_not_taken_for_submitted(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Service may exist; `kubectl apply` of an equal job, even an ended one, does nothing."""
    text = JOB + '# ---\n[job]\ndescription = """\n---\n"""\n'
    Path(job).write_text(text)
    write = 'test "$*" = "$1 -f -" && cat >"$(dirname "$0")/$1"; [ "$1" != "$FAILS" ]'
    (tmp_path / "kubectl").write_text(f"#!/bin/bash\n{write}\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for fails, code in {"nothing": 0, "create": 1}.items():
        monkeypatch.setenv("FAILS", fails)
        assert main([job, *KINDS["job"]]) == code
    assert yaml.safe_load((tmp_path / "apply").read_text())["kind"] == "Service"
    manifest = (tmp_path / "create").read_text()
    assert yaml.safe_load(manifest)["kind"] == "Job" and script_of("job", manifest)
    (tmp_path / "create").unlink()
    monkeypatch.setenv("FAILS", "apply")
    assert main([job, *KINDS["job"]]) == 1 and not (tmp_path / "create").exists()


def test_slurm_does_not_pass_on_an_interactive_job(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm 22.05 gives a job the variables of the one that submitted it, and srun reads them."""
    (tmp_path / "sbatch").write_text('#!/bin/bash\nenv | grep ^S >"${0%/*}/env"; cat >/dev/null\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "me"}
    stale = {"SLURM_CPUS_PER_TASK": "1", "SLURM_MEM_PER_CPU": "100", "SLURM_JOB_ID": "3"}
    for name, value in (kept | stale).items():
        monkeypatch.setenv(name, value)
    assert main([job, "--slurm"]) == 0
    seen = (tmp_path / "env").read_text().splitlines()
    assert sorted(line for line in seen if line.startswith(("SLURM", "SBATCH"))) == [
        "SBATCH_ACCOUNT=me",
        "SLURM_CONF=/etc/slurm.conf",
    ]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-02:30", 95400),
        ("1-02:03:04", 93784),
    ],
)
def test_times_are_those_of_slurm(written: str, seconds: int) -> None:
    assert seconds_of(written) == seconds


MISTAKES = {
    "no scheduler": ([], ["--slurm", "--kubernetes", "given: none"]),
    "two": (["--slurm", "--skypilot"], ["--slurm and --skypilot"]),
    "other's option": (["--skypilot", "--partition=gpu"], ["--partition", "--slurm"]),
    "no image": (["--kubernetes"], ["--image"]),
    "no hosts": (["--ssh"], ["--hosts"]),
    "a host twice": (["--ssh", "--hosts=a,a"], ["twice"]),
    "nodes of ssh": (["--ssh", "--hosts=a,b", "--nodes=3"], ["--nodes 3", "2"]),
    "nodes": (["--slurm", "--nodes=0"], ["--nodes 0", "at least 1"]),
    "no processes": (["--slurm", "--gpus-per-node=0"], ["--processes-per-node"]),
    "zero processes": (["--slurm", "--processes-per-node=0"], ["--processes-per-node 0: a host"]),
    "no python": (["--slurm", "--python="], ["--python: is empty"]),
    "home folder": (["--slurm", "--workdir=~/runs"], ["--workdir ~/runs", "not expanded"]),
    "mounts": (["--skypilot", "--mount=s3://a:/x", "--mount=s3://b:/x"], ["two sources", "/x"]),
    "secret shown": (["--slurm", "--env=HF_TOKEN=x"], ["--secret HF_TOKEN"]),
    "password": (["--slurm", "--env=PGPASSWD=x"], ["--secret PGPASSWD"]),
    "env": (["--slurm", "--env=A"], ["--env A", "NAME=VALUE"]),
    "secret": (["--slurm", "--secret=A=b/c"], ["--secret A=b/c", "Kubernetes"]),
    "mount": (["--skypilot", "--mount=/data"], ["--mount /data", "SOURCE:/PATH"]),
    "bucket without a path": (["--skypilot", "--mount=s3://b"], ["--mount s3://b", "SOURCE:/PATH"]),
    "checkpoints in a copy": (
        ["--skypilot", "--mount=s3://b/runs:/out", "--", "--job.dump_folder=/out/mine"],
        ["--mount s3://b/runs:/out", "/out/mine/checkpoint", "copies to the hosts but not back"]
        + ["-- --checkpoint.folder s3://b/runs/my-job"],
    ),
    "time that ends at once": (
        ["--slurm", "--time=4"],
        ["--time 4", "longer than --grace 180 and 60 s"],
    ),
    "short option": (["--slurm", "--sbatch=-C h100"], ["--sbatch -C h100", "the long form"]),
    "time": (["--slurm", "--time=soon"], ["--time soon", "HOURS:MINUTES:SECONDS"]),
    "name": (["--slurm", "--name=My_Job"], ["--name My_Job", "lowercase letters"]),
    "sbatch": (["--slurm", "--sbatch=--nodes=9"], ["--sbatch --nodes=9"]),
    "time of sbatch": (["--slurm", "--sbatch=time=1"], ["--sbatch time=1", "another option"]),
    "tasks side by side": (["--slurm", "--sbatch=array=1-5"], ["array=1-5: ", "array=1-5%1."]),
    "injection": (["--slurm", "--partition=a\n#SBATCH -b"], ["one word"]),
    "world": (
        ["--slurm", "--nodes=3", "--", "--parallelism.tensor_parallel_degree=16"],
        ["tensor_parallel_degree = 16", "world size 24", "must be one of", "--nodes 3"],
    ),
    "heads": (
        ["--slurm", "--nodes=3", "--", "--parallelism.tensor_parallel_degree=3"]
        + ["--training.seq_len=384"],
        ["tensor_parallel_degree = 3", "n_heads", "Degrees that do: 1, 2, 4"],
    ),
    "schedule": (
        ["--slurm", "--", "--parallelism.pipeline_parallel_degree=4"]
        + ["--training.local_batch_size=2"],
        ["local_batch_size = 2", "2 micro-batches", "at least 4"],
    ),
    "stages": (
        ["--slurm", "--nodes=2", "--", "--parallelism.pipeline_parallel_degree=16"]
        + ["--training.local_batch_size=16"],
        ["pipeline_parallel_degree", "16"],
    ),
    "batch": (
        ["--slurm", "--", "--training.global_batch_size=100"],
        ["global_batch_size = 100", "Nearest:", "--nodes 1 x 8 processes; set them with"],
    ),
    "model": (["--slurm", "--", "--model.name=lama3"], ["lama3", "'llama3'"]),
    "flavor": (["--slurm", "--", "--model.flavor=8"], ["flavor", "8B"]),
    "dataset": (["--slurm", "--", "--training.dataset=c5"], ["c5", "Did you mean 'c4'"]),
    "key": (["--slurm", "--", "--training.sequence=3"], ["sequence"]),
    "two lines": (["--slurm", "--workdir=/a\ntouch b"], ["--workdir: must be one line"]),
    "carriage return": (["--slurm", "--sbatch=comment=a\rtouch b"], ["argument", "U+000D"]),
    "line separator": (["--ssh", "--hosts=a", "--env=A=b\u2028c"], ["argument", "U+2028"]),
    "out": (["--slurm", "--out=/no/such/file"], ["--out /no/such/file", "no such folder"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name: str, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = MISTAKES[name]
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    with pytest.raises(ConfigError) as refused:
        main([job, *own, "--dry-run", *arguments[len(own) :]])
    assert not capsys.readouterr().out
    for word in words:
        assert word in str(refused.value)


def test_the_command_ends_with_the_code_of_a_mistake(job: str) -> None:
    done = command("launch", job, "--dry-run")
    assert done.exit_code == 2, done.out + done.err
    assert "Traceback" not in done.err and not done.out


@pytest.mark.parametrize(
    "options",
    [
        ["--training.on_nonfinite=rollback", "--training.on_spike=rollback"],
        ["--checkpoint.folder=nothing://bucket/run", "--checkpoint.load_step=3"],
        ["--fault_tolerance.enable", "--fault_tolerance.group_size=2"],
    ],
)
def test_what_only_the_cluster_has_is_not_looked_for(
    options: list[str], job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "torchtitan" in render(capsys, job, "--slurm", "--dry-run", "--", *options)


def test_cuda_graphs_are_for_one_rank(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, graphs = "--gpus-per-node=1", ["--compile.enable", "--compile.mode=reduce-overhead"]
    assert "torchtitan" in render(capsys, job, "--slurm", one, "--dry-run", "--", *graphs)
    with pytest.raises(ConfigError, match=r"compile\.mode.*several ranks"):
        main([job, "--slurm", "--dry-run", "--", *graphs])


def test_a_model_without_a_pipeline_is_refused(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(get_train_spec("llama3", "debugmodel"), pipeline_fn=None)
    monkeypatch.setattr("torchtitan.preflight.model_fit.train_spec_of", lambda *_: spec)
    with pytest.raises(ConfigError, match="llama3 has no pipeline_fn"):
        main([job, "--slurm", "--dry-run", "--", "--parallelism.pipeline_parallel_degree=2"])


def test_a_rule_for_no_parameter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(JOB + '[[optimizer.rules]]\npattern = "layer.1"\n')
    with pytest.raises(ConfigError, match=r"pattern 'layer\.1' matches no parameter"):
        main([str(path), "--slurm", "--dry-run"])


def test_a_missing_secret_is_told_before_the_job_waits_in_the_queue(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("torchtitan.launching.slurm.submit", lambda *_: 0)
    monkeypatch.setattr("torchtitan.launching.kubernetes.submit", lambda *_: 0)
    with pytest.raises(ConfigError, match="--secret HF_TOKEN: is not in your environment"):
        main([job, "--slurm", "--secret=HF_TOKEN"])
    assert main([job, *KINDS["job"], "--secret=HF_TOKEN"]) == 0  # the cluster has it
    assert "HF_TOKEN:?" in render(capsys, job, "--slurm", "--secret=HF_TOKEN", "--dry-run")
    monkeypatch.setenv("HF_TOKEN", "x")
    assert main([job, "--slurm", "--secret=HF_TOKEN"]) == 0


def test_a_missing_tool_is_one_message(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(ConfigError, match=r"the command 'sbatch' is missing.*--dry-run"):
        main([job, "--slurm"])


@pytest.mark.parametrize("text", ["[model\n", "[model]\nflavour = 'x'\n"])
def test_a_broken_file_is_named_with_its_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path)) + ":[12]: "):
        main([str(path), "--slurm", "--dry-run"])


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith(".yaml")])
def test_manifests_agree_with_the_schemas(name: str) -> None:
    """Of Kubernetes, JobSet, the training operator and SkyPilot, if their packages are here:
    kubernetes-validate, kubeflow-trainer-api, kubeflow-training, skypilot.
    """
    for document in yaml.safe_load_all((ROOT / "launchers" / name).read_text()):
        kind = document.get("kind")
        if kind in ("Job", "Service"):
            pytest.importorskip("kubernetes_validate").validate(document, "1.34", strict=True)
        elif kind == "JobSet":
            models = pytest.importorskip("kubeflow_trainer_api.models")
            model = models.JobsetV1alpha2JobSet.from_json(json.dumps(document))
            _same(document, json.loads(model.to_json()))
        elif kind == "PyTorchJob":
            client = pytest.importorskip("kubeflow.training").ApiClient()
            response = type("Response", (), {"data": json.dumps(document)})
            model = client.deserialize(response, "KubeflowOrgV1PyTorchJob")
            _same(document, client.sanitize_for_serialization(model))
        else:
            schemas = pytest.importorskip("sky.utils.schemas")
            jsonschema = pytest.importorskip("jsonschema")
            jsonschema.validate(document, schemas.get_task_schema())
            jsonschema.validate(document["resources"], schemas.get_resources_schema())


def _same(written: object, read: object) -> None:
    """Whether the client's model knows all that is written: it drops other keys."""
    if isinstance(written, dict):
        for key, value in written.items():
            assert key in read, key
            _same(value, read[key])
    elif isinstance(written, list):
        for value, other in zip(written, read, strict=True):
            _same(value, other)
    else:  # the client makes text of quantities, which may be numbers in a manifest
        assert read in (written, str(written))


def test_the_templates_are_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "launching/templates/*" in project["tool"]["setuptools"]["package-data"]["torchtitan"]


def test_help_and_wrong_options_do_not_wait_for_torch() -> None:
    code = "import sys, torchtitan.launching.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
