{{/* Selects the release's Ray pods, head and workers, of every cluster KubeRay makes for it. Their app.kubernetes.io/name
must stay KubeRay's: its head service selects by that. */}}
{{- define "paceline.rayPods" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
ray.io/is-ray-node: "yes"
{{- end }}

{{/* Host of Redis: the subchart's service, or redis.host. */}}
{{- define "paceline.redisHost" -}}
{{- if .Values.redis.install -}}
{{- printf "%s-redis" (.Release.Name | trunc 50 | trimSuffix "-") -}}
{{- else -}}
{{- required "redis.host: redis.enabled needs it; set it to the host of your Redis, or set redis.install" .Values.redis.host -}}
{{- end -}}
{{- end }}

{{/* Host and port of Redis. */}}
{{- define "paceline.redisAddress" -}}
{{- include "paceline.redisHost" . }}:{{ .Values.redis.port -}}
{{- end }}

{{/* For sessions.store: no password in it, which Ray's dashboard would show. */}}
{{- define "paceline.redisUrl" -}}
{{- with .Values.redis -}}
{{ ternary "rediss" "redis" .tls }}://{{ empty .username | ternary "" (printf "%s@" .username) }}{{ include "paceline.redisAddress" $ }}/{{ .database }}
{{- end -}}
{{- end }}

{{/* Where models are kept, in every pod, and with which token they are fetched. */}}
{{- define "paceline.cacheEnv" -}}
- {name: PACELINE_CACHE, value: {{ .Values.modelCache.mountPath }}/paceline}
- {name: HF_HOME, value: {{ .Values.modelCache.mountPath }}/huggingface}
{{- with .Values.hub }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .tokenKey }}}}
{{- end }}
{{- end }}
{{- end }}
