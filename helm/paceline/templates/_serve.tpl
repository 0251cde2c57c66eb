{{/* The Ray Serve config. EveryNode: a pod is ready when its own proxy answers, so workers need one. */}}
{{- define "paceline.serveConfig" -}}
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
grpc_options:
  port: 9000
  grpc_servicer_functions: [paceline.rpc.inference_server.add_inference_servicer]
applications:
  - name: paceline
    route_prefix: /
    import_path: paceline.serving.app:build
    {{- if .Values.autoscaling.enabled }}
    autoscaling_policy: {policy_function: "paceline.serving.autoscaling:Autoscaler"}
    {{- end }}
    args: {{- include "paceline.args" . | nindent 6 }}
{{- end }}

{{/* Settings of Paceline: those of typed values, and `config`, which has none of them. */}}
{{- define "paceline.args" -}}
{{- $args := include "paceline.typedArgs" . | fromYaml -}}
{{- include "paceline.join" (dict "args" $args "config" .Values.config "at" "") -}}
{{- toYaml $args -}}
{{- end }}

{{/* Puts `config` into `args`, in place. What a value says already is refused: one of the two would be forgotten. */}}
{{- define "paceline.join" -}}
{{- $args := .args -}}
{{- range $key, $value := .config -}}
{{- $path := printf "%s%s" $.at $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $args $key)) -}}
{{- include "paceline.join" (dict "args" (get $args $key) "config" $value "at" (printf "%s." $path)) -}}
{{- else if hasKey $args $key -}}
{{- fail (printf "config.%s: set by another value of the chart; see README.md for its name" $path) -}}
{{- else -}}
{{- $_ := set $args $key $value -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "paceline.typedArgs" -}}
model: {{ .Values.model | quote }}
{{- with .Values.servedModelName }}
served_model_name: {{ . | quote }}
{{- end }}
num_routers: {{ .Values.routers }}
target: {{- include "paceline.replicas" (dict "role" "target" "of" .Values.target) | nindent 2 }}
  drain_timeout_s: {{ .Values.target.drainTimeoutSeconds }}
draft:
  {{- if not .Values.draft.enabled }}
  num_replicas: 0
  {{- else }}
  {{- include "paceline.replicas" (dict "role" "draft" "of" .Values.draft) | nindent 2 }}
  {{- with include "paceline.draftModel" . }}
  model: {{ . | quote }}
  {{- end }}
  {{- end }}
speculation:
  enabled: {{ .Values.speculation.enabled }}
  depth: {{ .Values.speculation.depth }}
  max_depth: {{ .Values.speculation.maxDepth }}
sessions:
  handoff_timeout_s: {{ .Values.target.handoffTimeoutSeconds }}
  {{- with .Values.redis }}
  {{- if .enabled }}
  store: {{ include "paceline.redisUrl" $ }}
  {{- if .existingSecret }}
  password_environment: {{ include "paceline.redisPasswordVariable" $ }}
  {{- end }}
  {{- end }}
  {{- end }}
{{- with .Values.apiKeys }}
{{- if .existingSecret }}
api_keys: {file: {{ include "paceline.apiKeysFolder" $ }}/{{ .key }}, metrics: {{ .metrics }}}
{{- end }}
{{- end }}
{{- with .Values.telemetry }}
telemetry:
  {{- with .otlpEndpoint }}
  otlp_endpoint: {{ . | quote }}
  {{- end }}
  trace_sample_ratio: {{ .traceSampleRatio }}
  log_format: {{ .logFormat }}
  log_requests: {{ .logRequests }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if .enabled }}
autoscaling:
  enabled: true
  preset: {{ .preset }}
  target: {min_replicas: {{ .target.minReplicas }}, max_replicas: {{ .target.maxReplicas }}}
  draft: {min_replicas: {{ .draft.minReplicas }}, max_replicas: {{ .draft.maxReplicas }}}
{{- end }}
{{- end }}
{{- end }}

{{/* Of either role. A rank takes one slot of a pod that is meant for it. */}}
{{- define "paceline.replicas" -}}
num_replicas: {{ .of.replicas }}
num_cpus: {{ .of.numCpus }}
num_gpus: {{ .of.numGpus }}
resources: {paceline_{{ .role }}: 1}
engine: {tensor_parallel_size: {{ .of.tensorParallelSize }}}
{{- end }}

{{- define "paceline.draftModel" -}}
{{- .Values.draft.model | default (eq .Values.model "smollm2-135m" | ternary "smollm2-135m-draft" "") -}}
{{- end }}
