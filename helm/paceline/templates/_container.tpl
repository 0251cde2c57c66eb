{{/* The Ray container; KubeRay puts `ray start` in it. Takes root, pod, component. */}}
{{- define "paceline.container" -}}
name: {{ eq .component "head" | ternary "ray-head" "ray-worker" }}
image: {{ include "paceline.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- with .pod.securityContext }}
securityContext: {{- toYaml . | nindent 2 }}
{{- end }}
env: {{- include "paceline.env" . | nindent 2 }}
{{- with .pod.envFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  {{- if eq .component "head" }}
  - {name: gcs-server, containerPort: 6379}
  - {name: dashboard, containerPort: 8265}
  {{- end }}
  - {name: metrics, containerPort: 8080}
  - {name: serve, containerPort: 8000}
  - {name: serve-grpc, containerPort: 9000}
resources: {{- include "paceline.resources" . | nindent 2 }}
{{- include "paceline.probes" . }}
{{- with include "paceline.lifecycle" . | fromYaml }}
lifecycle: {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts: {{- include "paceline.volumeMounts" . | nindent 2 }}
{{- end }}

{{/* A worker that ends empties its node first. What a hook prints is lost, unless it is in the container's log: the output
of its first process. */}}
{{- define "paceline.lifecycle" -}}
{{- $lifecycle := deepCopy .pod.lifecycle -}}
{{- if and (ne .component "head") .pod.handOver (not (hasKey $lifecycle "preStop")) -}}
{{- $within := max 1 (sub (include "paceline.gracePeriod" . | int) 15) -}}
{{- $command := list "paceline" "leave" "--within" (toString $within) "--log" "/proc/1/fd/1" -}}
{{- $_ := set $lifecycle "preStop" (dict "exec" (dict "command" $command)) -}}
{{- end -}}
{{- toYaml $lifecycle -}}
{{- end }}

{{/* Its resources, with the accelerator in requests and limits, which must be equal. A pod with sockets of its own has as
limits what it requests: only then the kubelet's static CPU manager gives it cores. */}}
{{- define "paceline.resources" -}}
{{- $resources := deepCopy .pod.resources -}}
{{- if .pod.cpuSockets -}}
{{- $_ := set $resources "limits" (deepCopy $resources.requests) -}}
{{- end -}}
{{- with .pod.accelerator -}}
{{- if .count -}}
{{- range $kind := list "requests" "limits" -}}
{{- $amounts := get $resources $kind | default dict -}}
{{- $_ := set $amounts $.pod.accelerator.resource $.pod.accelerator.count -}}
{{- $_ := set $resources $kind $amounts -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{/* What Ray Serve is told on every node, as paceline.serving.environment.CLUSTER has it. */}}
{{- define "paceline.serveEnvironment" -}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: "3600"}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S, value: "1"}
- {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
{{- end }}

{{- define "paceline.env" -}}
{{- include "paceline.serveEnvironment" . }}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{ include "paceline.cacheEnv" .root }}
{{- with .root.Values.redis }}
{{- if and .enabled .existingSecret }}
- name: {{ include "paceline.redisPasswordVariable" $ }}
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .passwordKey }}}}
{{- end }}
{{- end }}
{{- with .pod.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Not REDIS_PASSWORD: KubeRay keeps that for itself. */}}
{{- define "paceline.redisPasswordVariable" -}}
PACELINE_REDIS_PASSWORD
{{- end }}

{{/* Ray's own health on every node; on workers a pod is ready when Serve's proxy, HAProxy, answers: KubeRay's probes, but
asked by the kubelet instead of by wget in the container, and a start may take its time. KubeRay looks at the head's proxy
itself. A worker has a proxy once a replica is there. */}}
{{- define "paceline.probes" -}}
{{- $node := dict "httpGet" (dict "path" "/api/healthz" "port" 52365) -}}
{{- $proxy := dict "httpGet" (dict "path" "/-/healthz" "port" "serve") }}
startupProbe: {{- merge (deepCopy .pod.startupProbe) $node | toYaml | nindent 2 }}
livenessProbe: {{- merge (deepCopy .pod.livenessProbe) $node | toYaml | nindent 2 }}
readinessProbe: {{- merge (deepCopy .pod.readinessProbe) (eq .component "head" | ternary $node $proxy) | toYaml | nindent 2 }}
{{- end }}

{{- define "paceline.volumeMounts" -}}
- {name: shared-mem, mountPath: /dev/shm}
- {name: models, mountPath: {{ .root.Values.modelCache.mountPath }}}
{{- if .root.Values.apiKeys.existingSecret }}
- {name: api-keys, mountPath: {{ include "paceline.apiKeysFolder" . }}, readOnly: true}
{{- end }}
{{- if .pod.securityContext.readOnlyRootFilesystem }}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/paceline}
{{- end }}
{{- with .pod.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "paceline.volumes" -}}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ .pod.sharedMemory | quote }}}
- name: models
  {{- if .root.Values.modelCache.enabled }}
  persistentVolumeClaim:
    claimName: {{ include "paceline.modelClaim" .root }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- with .root.Values.apiKeys.existingSecret }}
- name: api-keys
  secret: {secretName: {{ . }}}
{{- end }}
{{- if .pod.securityContext.readOnlyRootFilesystem }}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
{{- end }}
{{- with .pod.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The claim of the model cache: one that exists, or the release's. */}}
{{- define "paceline.modelClaim" -}}
{{- .Values.modelCache.existingClaim | default (printf "%s-models" (include "paceline.fullname" .)) -}}
{{- end }}

{{- define "paceline.apiKeysFolder" -}}
/etc/paceline/api-keys
{{- end }}
