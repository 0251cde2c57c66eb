{{- define "redis.name" -}}
{{ printf "%s-redis" (.Release.Name | trunc 50 | trimSuffix "-") }}
{{- end }}

{{- define "redis.selectorLabels" -}}
app.kubernetes.io/name: redis
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "redis.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "redis.selectorLabels" . }}
app.kubernetes.io/part-of: paceline
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "redis.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ empty .digest | ternary (printf ":%s" .tag) (printf "@%s" .digest) }}
{{- end -}}
{{- end }}

{{- define "redis.password" -}}
valueFrom:
  secretKeyRef:
    name: {{ required "redis.existingSecret: redis.install needs a secret with a password: kubectl create secret generic redis-password --from-literal=password=$(openssl rand -hex 24)" .Values.existingSecret }}
    key: {{ .Values.passwordKey }}
{{- end }}

{{/* redis-cli ends with 0 also while Redis still reads its log. */}}
{{- define "redis.ping" -}}
exec:
  command: [sh, -c, "redis-cli -p {{ .Values.port }} ping | grep -q PONG"]
{{- end }}
