"""A Ray cluster over HTTP: its jobs, its Serve applications and its free resources.

Everything here is a plain request to the dashboard, so the caller never joins the cluster: `ray.init` would replace its
signal handlers, and would end the process a minute after the head is gone.
"""

from __future__ import annotations

from typing import Any, Literal

import httpx

from trainers.errors import Unavailable

JobState = Literal["absent", "alive", "ended"]
"""What Ray knows of a submission: never heard of it, pending or running, over (however it ended)."""


class RayRest:
    """Client of one cluster's dashboard. Every method raises Unavailable when the cluster does not answer as it should."""

    def __init__(self, address: str, token: str | None = None, timeout_s: float = 15.0) -> None:
        self.address = address.rstrip("/")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        # trust_env off: a proxy configured for the outside world must not see loopback traffic or the token.
        self._http = httpx.Client(base_url=self.address, headers=headers, timeout=timeout_s, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RayRest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, path: str, *, missing_ok: bool = False, **kwargs: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"The Ray cluster at {self.address} does not answer ({type(error).__name__}).",
                "Check that it runs; `tuneyard up` starts a local one.",
            ) from None
        if response.status_code in (401, 403):
            raise Unavailable(f"The Ray cluster at {self.address} refuses our token.", "Set RAY_AUTH_TOKEN to the cluster's token.")
        if response.is_error and not (missing_ok and response.status_code == 404):
            # Ray answers with a whole stack trace; its last line says what happened.
            last = (response.text.strip().splitlines() or [""])[-1].strip(" .")
            already = "already exists" in response.text
            raise (
                AlreadySubmitted(last) if already else Unavailable(f"Ray answered {response.status_code} to {method} {path}: {last[:300]}.")
            )
        return response

    # -- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, submission_id: str, entrypoint: str, env: dict[str, str] | None = None) -> None:
        """Start `entrypoint` (a shell command) once; submitting the same id again changes nothing."""
        # Ask before: two submissions with one id can make both fail.
        if self.state(submission_id)[0] != "absent":
            return
        body: dict[str, Any] = {"submission_id": submission_id, "entrypoint": entrypoint}
        if env:
            body["runtime_env"] = {"env_vars": env}
        try:
            self._ask("POST", "/api/jobs/", json=body)
        except AlreadySubmitted:
            return

    def state(self, submission_id: str) -> tuple[JobState, str]:
        """(state, Ray's own words about it)."""
        response = self._ask("GET", f"/api/jobs/{submission_id}", missing_ok=True)
        if response.status_code == 404:
            return "absent", "the cluster does not know it"
        job = response.json()
        return ("alive" if job["status"] in ("PENDING", "RUNNING") else "ended"), str(job.get("message") or job["status"])

    def stop(self, submission_id: str) -> None:
        """Ask a submission to stop: SIGTERM to its processes, SIGKILL three seconds later."""
        self._ask("POST", f"/api/jobs/{submission_id}/stop", missing_ok=True)

    # -- serve -------------------------------------------------------------------------------------------------------

    def applications(self) -> dict[str, dict[str, Any]]:
        """Serve's applications: name -> {"status", "message", ...}; empty when Serve does not run.

        Where the cluster lets requests go straight to replicas (RAY_SERVE_ENABLE_DIRECT_INGRESS), `addresses` lists where they answer,
        each as host:port.
        """
        told = self._ask("GET", "/api/serve/applications/").json()
        applications: dict[str, dict[str, Any]] = told.get("applications", {})
        for app in applications.values():
            app["addresses"] = []
        for group in told.get("target_groups", ()):
            if group["protocol"] == "HTTP" and (app := applications.get(group["app_name"])):
                app["addresses"] += [f"{target['ip']}:{target['port']}" for target in group["targets"]]
        return applications

    def deploy(self, applications: list[dict[str, Any]], host: str, port: int) -> None:
        """Make these the cluster's applications. The first call starts Serve, and only that one can choose host and port."""
        config = {"proxy_location": "HeadOnly", "http_options": {"host": host, "port": port}, "applications": applications}
        self._ask("PUT", "/api/serve/applications/", json=config, timeout=60.0)

    # -- resources ---------------------------------------------------------------------------------------------------

    def resources(self) -> dict[str, tuple[float, float]]:
        """Resource name -> (in use, in all), over all nodes; empty while a young cluster has not counted yet."""
        status = self._ask("GET", "/api/cluster_status").json()["data"]["clusterStatus"] or {}
        return {name: (used, total) for name, (used, total) in status.get("loadMetricsReport", {}).get("usage", {}).items()}


class AlreadySubmitted(Unavailable):
    """Ray has a job of this submission id."""
