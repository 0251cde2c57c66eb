"""The tables of `leaves`, for the values of the objects around the RayService."""

from __future__ import annotations

from typing import Any

from tests.k8s.leaves_shared import REDIS, SMALL

GATEWAY = [{"name": "public"}]
PEER = [{"podSelector": {}}]
CACHE = {"modelCache.enabled": True}
INSTALLED = {"redis.install": True, "redis.existingSecret": "redis"}

OTHER: dict[str, Any] = {
    "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}}],
    "grpcRoute.hostnames": ["grpc.example.org"],
    "grpcRoute.parentRefs": [{"name": "other"}],
    "httpRoute.hostnames": ["llm.example.org"],
    "httpRoute.parentRefs": [{"name": "other"}],
    "httpRoute.requestTimeout": "600s",
    "ingress.hosts": ["llm.example.org"],
    "modelCache.accessMode": "ReadWriteOnce",
    "modelCache.job.resources": SMALL,
    "modelCache.job.tolerations": [{"key": "k", "operator": "Exists"}],
    "modelCache.size": "1Ti",
    "networkPolicy.clients": PEER,
    "networkPolicy.dashboard": PEER,
    "networkPolicy.egress.extra": [{"to": PEER}],
    "networkPolicy.operator": PEER,
    "networkPolicy.prometheus": PEER,
    "prometheusRule.itlSeconds": 0.2,
    "redis.image.digest": f"sha256:{'0' * 64}",
    "redis.image.pullPolicy": "Always",
    "redis.resources": SMALL,
    "redis.size": "1Gi",
    "redis.tolerations": [{"key": "k", "operator": "Exists"}],
    "serviceMonitor.interval": "1m",
    "telemetry.logFormat": "json",
    "telemetry.otlpEndpoint": "http://collector:4317",
    "telemetry.traceSampleRatio": 0.5,
}
NEEDS: dict[str, dict[str, Any]] = {
    "dashboards": {"dashboards.enabled": True},
    "dashboards.enabled": {},
    "grpcRoute": {"grpcRoute.enabled": True, "grpcRoute.parentRefs": GATEWAY},
    "grpcRoute.enabled": {"grpcRoute.parentRefs": GATEWAY},
    "httpRoute": {"httpRoute.enabled": True, "httpRoute.parentRefs": GATEWAY},
    "httpRoute.enabled": {"httpRoute.parentRefs": GATEWAY},
    "ingress": {"ingress.enabled": True},
    "ingress.enabled": {},
    "modelCache": CACHE,
    "modelCache.enabled": {},
    "modelCache.job": CACHE,
    "modelCache.mountPath": {},
    "networkPolicy.egress": {"networkPolicy.egress.restrict": True},
    "networkPolicy.egress.restrict": {},
    "podDisruptionBudget": {"podDisruptionBudget.enabled": True},
    "podDisruptionBudget.enabled": {},
    "prometheusRule": {"prometheusRule.enabled": True},
    "prometheusRule.enabled": {},
    "redis.enabled": {"redis.host": "redis"},
    "redis.image": INSTALLED,
    "redis.install": {"redis.existingSecret": "redis"},
    "redis.nodeSelector": INSTALLED,
    "redis.resources": INSTALLED,
    "redis.size": INSTALLED,
    "redis.storageClass": INSTALLED,
    "redis.tolerations": INSTALLED,
    "redis.username": REDIS,
    "serviceMonitor": {"serviceMonitor.enabled": True},
    "serviceMonitor.enabled": {},
    "serviceMonitor.secretKey": {"serviceMonitor.enabled": True, "serviceMonitor.existingSecret": "key"},
}
