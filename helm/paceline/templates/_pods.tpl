{{/* Labels of a pod. KubeRay's service of the head selects app.kubernetes.io/name and created-by as KubeRay sets them, so
both stay as they are; and none of ours changes with the chart's version, which would ask for a new cluster. */}}
{{- define "paceline.podLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: paceline
app.kubernetes.io/component: {{ .component }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with .pod.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The pod of the head or of a group. Takes root, pod (its settings), component, name. */}}
{{- define "paceline.podTemplate" -}}
metadata:
  labels: {{- include "paceline.podLabels" . | nindent 4 }}
  {{- with .pod.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "paceline.serviceAccountOf" . | nindent 2 }}
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- if .root.Values.autoscaling.enabled }}
  restartPolicy: Never
  {{- end }}
  terminationGracePeriodSeconds: {{ include "paceline.gracePeriod" . }}
  {{- with .pod.podSecurityContext }}
  securityContext: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "paceline.scheduling" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .pod.initContainers }}
  initContainers: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - {{ include "paceline.container" . | indent 6 | trim }}
    {{- with .pod.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes: {{- include "paceline.volumes" . | nindent 4 }}
{{- end }}

{{/* Under autoscaling KubeRay runs the head as an account that it makes, with rights over pods, and binds these rights to
an account that is named here: then workers would have them too. */}}
{{- define "paceline.serviceAccountOf" -}}
{{- if and (eq .component "head") .root.Values.autoscaling.enabled -}}
automountServiceAccountToken: true
{{- else -}}
automountServiceAccountToken: {{ .root.Values.serviceAccount.automountToken }}
{{- with include "paceline.serviceAccountName" .root }}
serviceAccountName: {{ . }}
{{- end }}
{{- end -}}
{{- end }}

{{- define "paceline.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "paceline.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* By default what the slowest replica may take to leave, router or target, and 90 more in which others start. */}}
{{- define "paceline.gracePeriod" -}}
{{- $router := dig "router_drain_timeout_s" 60 .root.Values.config | float64 | ceil | int -}}
{{- with .root.Values.target -}}
{{- $slowest := max $router (add .drainTimeoutSeconds .handoffTimeoutSeconds) -}}
{{- $.pod.terminationGracePeriodSeconds | default (add $slowest 90) -}}
{{- end -}}
{{- end }}

{{/* Where the pod goes: selectors and tolerations of its own, of its accelerator and of spot nodes. */}}
{{- define "paceline.scheduling" -}}
{{- $selector := deepCopy .pod.nodeSelector -}}
{{- $tolerations := .pod.tolerations -}}
{{- with .pod.accelerator -}}
{{- if .count -}}
{{- if .product }}{{ $_ := set $selector .productLabel .product }}{{ end -}}
{{- $tolerations = append $tolerations (dict "key" .resource "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- end -}}
{{- with .pod.spot -}}
{{- $marks := dict "gke" "cloud.google.com/gke-spot=true" "eks" "eks.amazonaws.com/capacityType=SPOT" "aks" "kubernetes.azure.com/scalesetpriority=spot" "karpenter" "karpenter.sh/capacity-type=spot" -}}
{{- $mark := splitList "=" (get $marks .) -}}
{{- $_ := set $selector (first $mark) (last $mark) -}}
{{- $tolerations = append $tolerations (dict "key" (first $mark) "operator" "Equal" "value" (last $mark) "effect" "NoSchedule") -}}
{{- end -}}
{{- $own := dict "nodeSelector" $selector "tolerations" $tolerations "affinity" .pod.affinity "topologySpreadConstraints" .pod.topologySpreadConstraints "priorityClassName" .pod.priorityClassName "runtimeClassName" .pod.runtimeClassName "schedulerName" .pod.schedulerName -}}
{{- range $key, $value := $own }}
{{- if $value }}
{{ dict $key $value | toYaml }}
{{- end }}
{{- end -}}
{{- end }}
