"""Renders for Kubernetes: a plain Job with its Service, a JobSet, or a PyTorchJob."""

from __future__ import annotations

import re
from typing import Any

from .job import LaunchJob, seconds_of
from .storage import split_mount
from .submit import require, run
from .template import fill, quoted

_RETRYABLE = 138
"""Exit code above 127, after which the PyTorchJob operator restarts a pod; 128 + SIGUSR1 is the
code that it leaves to the user."""

_JOIN_SECONDS = 24 * 3600
"""Otherwise pods that wait for one without a host would end, and count as crashes."""


def render(job: LaunchJob) -> str:
    """Return the manifests for kubectl."""
    options = job.options
    kind = options.kind or "job"
    head = {
        "job": f"{job.name}-0.{job.name}",
        "jobset": f"{job.name}-node-0-0.{job.name}",
        "pytorchjob": f"{job.name}-master-0",
    }[kind]
    deadline = f"activeDeadlineSeconds: {seconds_of(options.time)}" if options.time else ""
    values: dict[str, Any] = {
        "title": job.title,
        "command": job.command,
        "name": job.name,
        "namespace": f"namespace: {quoted(options.namespace)}" if options.namespace else "",
        "nodes": options.nodes,
        "max_restarts": options.max_restarts,
        "backoff": options.max_restarts * options.nodes,  # counts failed pods
        "deadline": deadline,
    }
    if kind == "pytorchjob":
        pod = _pod(job, head, "$RANK", restart_policy="")
        replicas = [fill("replica.yaml", role="Master", replicas=1, pod=pod)]
        if options.nodes > 1:
            replicas.append(
                fill("replica.yaml", role="Worker", replicas=options.nodes - 1, pod=pod)
            )
        return fill("pytorchjob.yaml", **values, replicas="".join(replicas))
    subdomain = f"subdomain: {quoted(job.name)}" if kind == "job" else ""  # a JobSet has one itself
    pod = _pod(job, head, "$JOB_COMPLETION_INDEX", "restartPolicy: Never", subdomain)
    return fill(f"{kind}.yaml", **values, pod=pod)


def submit(job: LaunchJob, text: str) -> int:
    require("kubectl", "Install it")
    service, _, workload = text.rpartition("\n---\n")
    if service and (code := run(["kubectl", "apply", "-f", "-"], service)):
        return code
    # `apply` would succeed and start nothing if a job of this name exists, even one that is over.
    return run(["kubectl", "create", "-f", "-"], workload)


def _pod(job: LaunchJob, head: str, index: str, restart_policy: str, subdomain: str = "") -> str:
    options = job.options
    torchrun = "" if restart_policy else f"--preempted-code {_RETRYABLE}"
    node = job.node(shell_environment=False, torchrun=torchrun, join_timeout=_JOIN_SECONDS)
    node += f'\nnode "{index}" {head} {options.port}'
    selector = dict(label.split("=", 1) for label in options.node_selector)
    pod_options = [restart_policy, subdomain]
    if selector:
        pod_options.append(f"nodeSelector: {quoted(selector)}")
    limits = {}
    if options.gpus_per_node:
        limits["nvidia.com/gpu"] = options.gpus_per_node
        toleration = "{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"
        pod_options.append(f"tolerations: [{toleration}]")
    variables: list[dict[str, Any]] = [
        {"name": name, "value": _without_expansion(value)}
        for name, value in job.environment.items()
    ]
    for secret in options.secret:
        name, _, where = secret.partition("=")
        of, _, key = where.rpartition("/")
        reference = {"name": of or "torchtitan", "key": key or name}
        variables.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    volumes, mounts = [], []
    for number, (source, path) in enumerate(map(split_mount, options.mount)):
        kind = f"persistentVolumeClaim: {{claimName: {quoted(source)}}}"
        if source.startswith("/"):
            kind = f"hostPath: {{path: {quoted(source)}}}"
        volumes.append(f"- {{name: mount-{number}, {kind}}}")
        mounts.append(f"- {{name: mount-{number}, mountPath: {quoted(path)}}}")
    return fill(
        "pod.yaml",
        pod_options="\n".join(option for option in pod_options if option),
        grace=options.grace,
        image=quoted(options.image),
        node=_without_expansion(node),
        environment="\n".join(f"- {quoted(variable)}" for variable in variables),
        resources=f"resources:\n  limits: {quoted(limits)}" if limits else "",
        volume_mounts="\n".join(mounts),
        volumes="\n".join(volumes),
    )


def _without_expansion(text: str) -> str:
    """Escape `$(NAME)`, which Kubernetes replaces by a container's variables; `$$` is its `$`."""
    return re.sub(r"\$(?=\$|\(\w+\))", "$$", text)
