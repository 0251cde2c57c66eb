{{- define "paceline.upgradeStrategy" -}}
type: {{ .strategy }}
{{- if eq .strategy "NewClusterWithIncrementalUpgrade" }}
clusterUpgradeOptions:
  gatewayClassName: {{ .gatewayClassName }}
  maxSurgePercent: {{ .maxSurgePercent }}
  stepSizePercent: {{ .stepSizePercent }}
  intervalSeconds: {{ .intervalSeconds }}
{{- end }}
{{- end }}

{{- define "paceline.rayCluster" -}}
rayVersion: {{ .Values.ray.version | quote }}
authOptions:
  mode: {{ .Values.ray.auth.mode }}
  {{- with .Values.ray.auth.secretName }}
  secretName: {{ . }}
  {{- end }}
{{- if .Values.autoscaling.enabled }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ .Values.autoscaling.idleTimeoutSeconds }}
  upscalingMode: {{ .Values.autoscaling.upscalingMode }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  resources: {{- toYaml .Values.autoscaling.resources | nindent 4 }}
  {{- with .Values.pods.securityContext }}
  securityContext: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- if .Values.gcsFaultTolerance.enabled }}
gcsFaultToleranceOptions:
  redisAddress: {{ ternary "rediss://" "" .Values.redis.tls }}{{ include "paceline.redisAddress" . }}
  {{- with .Values.redis }}
  {{- with .username }}
  redisUsername: {value: {{ . | quote }}}
  {{- end }}
  {{- if .existingSecret }}
  redisPassword:
    valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .passwordKey }}}}
  {{- end }}
  {{- end }}
{{- end }}
{{- $head := include "paceline.head" . | fromYaml }}
headGroupSpec:
  rayStartParams: {{- toYaml $head.rayStartParams | nindent 4 }}
  resources: {CPU: {{ $head.numCpus | quote }}}
  template: {{- include "paceline.podTemplate" (dict "root" . "pod" $head "component" "head") | nindent 4 }}
workerGroupSpecs:
  {{- range $name, $group := include "paceline.groups" . | fromYaml }}
  - {{ include "paceline.workerGroup" (dict "root" $ "name" $name "group" $group) | indent 4 | trim }}
  {{- end }}
{{- end }}

{{- define "paceline.workerGroup" -}}
{{- $scales := .root.Values.autoscaling.enabled -}}
groupName: {{ .name }}
replicas: {{ .group.minReplicas }}
minReplicas: {{ .group.minReplicas }}
maxReplicas: {{ $scales | ternary .group.maxReplicas .group.minReplicas }}
numOfHosts: {{ .group.numOfHosts }}
{{- if $scales }}
{{- with .group.idleTimeoutSeconds }}
idleTimeoutSeconds: {{ . }}
{{- end }}
{{- with .group.priority }}
priority: {{ . }}
{{- end }}
{{- end }}
rayStartParams: {{- toYaml .group.rayStartParams | nindent 2 }}
resources:
  CPU: {{ .group.cpus | quote }}
  {{- range $role, $slots := .group.slots }}
  paceline_{{ $role }}: {{ $slots | quote }}
  {{- end }}
template: {{- include "paceline.podTemplate" (dict "root" .root "pod" .group "component" .group.role) | nindent 2 }}
{{- end }}
