"""Ray Train's processes, started before they are asked for: they load Ray Train and torch while the data is still being prepared.

Ray starts the controller when `fit()` is called, and the workers when the controller asks for them; each then loads for seconds, one
after the other. `ahead` asks Ray for such processes at once. It is only a hint: what is not there in time, or is not quite what is
asked for in the end, Ray starts then, and what nobody uses ends by itself.

Ray runs `begin` in each new process, so this module loads nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

WORKER = "TUNEYARD_WORKER"
"""In the environment of those processes that will train."""
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""Ray's own name for what a new process runs first; `worker_process_setup_hook` is read from a whole job's runtime environment only."""
KEPT_S = 120
"""How long a process waits to be used."""


def begin() -> None:
    """Load what this process will need, before it takes any work: beside it, two threads would load the same modules."""
    for module in ("trainers.distributed", "trainers.train") if WORKER in os.environ else ("trainers.distributed",):
        with suppress(Exception):  # whatever it is, who needs the module will meet it and tell
            importlib.import_module(module)


def ahead(node: Mapping[str, Any], count: int, *environments: Mapping[str, str]) -> None:
    """Ask a machine (an entry of `ray.nodes()`) for `count` processes.

    `environments` are the variables that the driver gives to an actor, then those that this one gives to its own, and so on.
    """
    import ray

    text = _as_ray_says(dict(ray.get_runtime_context().runtime_env), environments)
    with suppress(Exception):  # private interfaces of Ray; without them, training starts a little later
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

        request = node_manager_pb2.PrestartWorkersRequest(num_workers=count, keep_alive_duration_secs=KEPT_S)  # type: ignore[attr-defined]
        request.runtime_env_info.serialized_runtime_env = text
        channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=5)
        channel.close()


def _as_ray_says(job: dict[str, Any], environments: Sequence[Mapping[str, str]]) -> str:
    """The text by which Ray tells processes apart; one is used where it is the very text of what is asked for."""
    variables = [job.get("env_vars", {}), *environments]
    merged = {**job, "env_vars": {name: value for each in variables for name, value in each.items()}}
    # Written by Ray's Python, unless its C++ side had to merge it with what is inherited.
    alone = not job and len(environments) == 1
    return json.dumps(merged, sort_keys=True, separators=None if alone else (",", ":"))
