{{/* Selects the release's Ray pods, head and workers, of every cluster KubeRay makes for it. Their app.kubernetes.io/name
must stay KubeRay's: its head service selects by that. */}}
{{- define "paceline.rayPods" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
ray.io/is-ray-node: "yes"
{{- end }}

{{/* Service account of the release's pods. */}}
{{- define "paceline.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "paceline.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* Claim with the models. */}}
{{- define "paceline.modelCacheClaim" -}}
{{- default (printf "%s-models" (include "paceline.fullname" .)) .Values.modelCache.existingClaim -}}
{{- end }}

{{/* Host of Redis: the subchart's service, or redis.host. */}}
{{- define "paceline.redisHost" -}}
{{- if .Values.redis.install -}}
{{- printf "%s-redis" (.Release.Name | trunc 50 | trimSuffix "-") -}}
{{- else -}}
{{- required "redis.host: redis.enabled needs the name of a server, or redis.install: true" .Values.redis.host -}}
{{- end -}}
{{- end }}

{{/* Address for sessions.store: no password in it, which Ray's dashboard would show. */}}
{{- define "paceline.redisUrl" -}}
{{- $user := ternary "" (printf "%s@" .Values.redis.username) (empty .Values.redis.username) -}}
{{- printf "%s://%s%s:%v/%v" (ternary "rediss" "redis" .Values.redis.tls) $user (include "paceline.redisHost" .) .Values.redis.port .Values.redis.database -}}
{{- end }}

{{/* Variable of the pods that holds the password of Redis. */}}
{{- define "paceline.redisPasswordVariable" -}}
PACELINE_REDIS_PASSWORD
{{- end }}

{{/* Where models are kept, in every pod, and with which token they are fetched. */}}
{{- define "paceline.cacheEnv" -}}
- name: PACELINE_CACHE
  value: {{ .Values.modelCache.mountPath }}/paceline
- name: HF_HOME
  value: {{ .Values.modelCache.mountPath }}/huggingface
{{- with .Values.hub.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.hub.tokenKey }}
{{- end }}
{{- end }}
