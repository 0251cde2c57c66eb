"""Paceline on Kubernetes: renders the chart, applies it, watches it come up, says what is wrong, takes it away.

The only importer of `kubernetes` and `helm_python`, both of the extra `k8s`.

    kinds       what an API server calls things, and where it has them
    connect     from a kubeconfig or a pod's own account to a connection
    api         one API server: get, list, apply, delete, logs, watch; its refusals as lines
    watching    changes of objects, over lost connections and forgotten versions
    server      Paceline itself, reached through the API server
"""
