"""What both tables of values use."""

SMALL = {"requests": {"cpu": "4", "memory": "5Gi"}, "limits": {"memory": "5Gi"}}
REDIS = {"redis.enabled": True, "redis.host": "redis", "redis.existingSecret": "redis"}
