"""Deploys an application on a Ray that runs, and takes it down again: `python -m tests.serve.deploying ADDRESS`.

A process of its own, since a process has one Ray, and the tests' has the session's. Reads a Serve config as one line of
JSON; answers with a line when all of it runs, the folder of Ray's logs; ends when its input does.
"""

from __future__ import annotations

import json
import sys
import time

import ray

from paceline.config import APP_NAME

TIMEOUT_S = 180.0


def main(address: str) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = json.loads(sys.stdin.readline())
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    serve.start(
        proxy_location=config["proxy_location"],
        http_options=config["http_options"],
        grpc_options=config["grpc_options"],
    )
    try:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
        deadline = time.monotonic() + TIMEOUT_S
        while (app := serve.status().applications.get(APP_NAME)) is None or app.status != "RUNNING":
            assert time.monotonic() < deadline and (app is None or app.status != "DEPLOY_FAILED"), app
            time.sleep(0.5)
        print(ray._private.worker.global_worker.node.get_session_dir_path(), flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
