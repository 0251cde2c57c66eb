{{/* What the schema cannot say: values that do not go together. Each message names the value and the remedy. */}}
{{- define "paceline.check" -}}
{{- $name := include "paceline.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "fullnameOverride: %s is no name for a RayService, which begins with a letter and has letters, digits and dashes; set it, or name the release otherwise" $name) -}}
{{- end -}}
{{- include "paceline.checkUpgrade" . -}}
{{- include "paceline.checkOperator" . -}}
{{- include "paceline.checkRedis" . -}}
{{- $groups := include "paceline.groups" . | fromYaml -}}
{{- include "paceline.checkRole" (dict "root" . "groups" $groups "role" "target") -}}
{{- if .Values.draft.enabled -}}
{{- include "paceline.checkRole" (dict "root" . "groups" $groups "role" "draft") -}}
{{- else if and .Values.autoscaling.enabled .Values.speculation.enabled -}}
{{- fail "draft.enabled: autoscaling would start drafts all the same; set speculation.enabled to false, or autoscaling.draft.minReplicas to 0 and draft.enabled to true" -}}
{{- end -}}
{{- range $name, $group := $groups -}}
{{- include "paceline.checkGroup" (dict "root" $ "name" $name "group" $group) -}}
{{- end -}}
{{- include "paceline.checkRouters" (dict "root" . "groups" $groups) -}}
{{- end }}

{{- define "paceline.checkUpgrade" -}}
{{- with .Values.upgrade -}}
{{- if eq .strategy "NewClusterWithIncrementalUpgrade" -}}
{{- if not $.Values.autoscaling.enabled -}}
{{- fail "upgrade.strategy: NewClusterWithIncrementalUpgrade needs Ray's autoscaler; set autoscaling.enabled, or take NewCluster" -}}
{{- end -}}
{{- if not .gatewayClassName -}}
{{- fail "upgrade.gatewayClassName: NewClusterWithIncrementalUpgrade needs the class of a Gateway (kubectl get gatewayclass); set it, or take strategy NewCluster" -}}
{{- end -}}
{{- if gt (int .stepSizePercent) (int .maxSurgePercent) -}}
{{- fail (printf "upgrade.stepSizePercent: %v is more than maxSurgePercent %v; lower it" .stepSizePercent .maxSurgePercent) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A chart that names a dependency it does not have cannot be installed, so a checkout does not name the operator. */}}
{{- define "paceline.checkOperator" -}}
{{- if and (index .Values "kuberay-operator" "install") (not (hasKey .Subcharts "kuberay-operator")) -}}
{{- fail "kuberay-operator.install: this copy of the chart came without the operator; install it by itself (README.md has the command), or package the chart: python helm/build.py --package dist" -}}
{{- end -}}
{{- end }}

{{- define "paceline.checkRedis" -}}
{{- with .Values.redis -}}
{{- if and $.Values.gcsFaultTolerance.enabled (not .enabled) -}}
{{- fail "gcsFaultTolerance.enabled: it keeps Ray's state in Redis; set redis.enabled too" -}}
{{- end -}}
{{- if .enabled -}}
{{- $_ := include "paceline.redisHost" $ -}}
{{- end -}}
{{- if and .install (or .host .username .tls) -}}
{{- fail "redis.install: the Redis that is installed has no redis.host, redis.username or redis.tls; leave them empty" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Whether all replicas of a role find room in the pods there may be. */}}
{{- define "paceline.checkRole" -}}
{{- $of := get .root.Values .role -}}
{{- $scaling := .root.Values.autoscaling -}}
{{- $needed := $scaling.enabled | ternary (get $scaling .role).maxReplicas $of.replicas | int -}}
{{- $value := $scaling.enabled | ternary (printf "autoscaling.%s.maxReplicas" .role) (printf "%s.replicas" .role) -}}
{{- $bound := $scaling.enabled | ternary "maxReplicas" "minReplicas" -}}
{{- if and $scaling.enabled (gt (int (get $scaling .role).minReplicas) $needed) -}}
{{- fail (printf "autoscaling.%s.minReplicas: %v is more than maxReplicas %v; lower it" .role (get $scaling .role).minReplicas $needed) -}}
{{- end -}}
{{- $room := 0 -}}
{{- range $name, $group := .groups -}}
{{- if has $group.role (list $.role "any") -}}
{{- $room = add $room (mul (get $group $bound) $group.replicasPerPod) -}}
{{- end -}}
{{- end -}}
{{- if lt (int $room) $needed -}}
{{- fail (printf "%s: %d replicas, but groups with role %s have room for %d; raise groups.*.%s or replicasPerPod, or lower it" $value $needed .role $room $bound) -}}
{{- end -}}
{{- end }}

{{- define "paceline.checkGroup" -}}
{{- $group := .group -}}
{{- if gt (int $group.minReplicas) (int $group.maxReplicas) -}}
{{- if .root.Values.autoscaling.enabled -}}
{{- fail (printf "groups.%s.minReplicas: %v is more than maxReplicas %v; lower it" .name $group.minReplicas $group.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- range $role, $slots := $group.slots -}}
{{- if or (eq $role "target") $.root.Values.draft.enabled -}}
{{- $of := get $.root.Values $role -}}
{{- if gt (mulf $of.numCpus $slots) (float64 $group.cpus) -}}
{{- fail (printf "groups.%s.resources.requests.cpu: %d ranks of a %s with %s.numCpus %v do not fit %v CPUs; raise it or lower those" $.name (int $slots) $role $role $of.numCpus $group.cpus) -}}
{{- end -}}
{{- if gt (mulf $of.numGpus $slots) (float64 $group.accelerator.count) -}}
{{- fail (printf "groups.%s.accelerator.count: %d ranks of a %s with %s.numGpus %v do not fit %v GPUs; raise it or lower those" $.name (int $slots) $role $role $of.numGpus $group.accelerator.count) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $group.cpuSockets -}}
{{- include "paceline.checkSockets" . -}}
{{- end -}}
{{- end }}

{{/* The kubelet's static CPU manager gives cores of their own to pods that request whole CPUs and as much as their limit. */}}
{{- define "paceline.checkSockets" -}}
{{- $requests := .group.resources.requests -}}
{{- $limits := .group.resources.limits | default dict -}}
{{- range $name := list "cpu" "memory" -}}
{{- if not (get $requests $name) -}}
{{- fail (printf "groups.%s.resources.requests.%s: cpuSockets needs it; set it to what the sockets have" $.name $name) -}}
{{- end -}}
{{- if ne (get $limits $name | default (get $requests $name) | toString) (get $requests $name | toString) -}}
{{- fail (printf "groups.%s.resources.limits.%s: with cpuSockets it is requests.%s (%v); leave it out" $.name $name $name (get $requests $name)) -}}
{{- end -}}
{{- end -}}
{{- if not (regexMatch "^[0-9]+$" (get $requests "cpu" | toString)) -}}
{{- fail (printf "groups.%s.resources.requests.cpu: %v is no whole number; with cpuSockets it must be one, so that the pod gets cores of its own" .name (get $requests "cpu")) -}}
{{- end -}}
{{- $ranks := get .group.slots "target" | default (get .group.slots "draft") | int -}}
{{- if ne $ranks (int .group.cpuSockets) -}}
{{- fail (printf "groups.%s.cpuSockets: %v sockets, but a pod has %d ranks; each rank takes one socket, so set tensorParallelSize or replicasPerPod to match" .name .group.cpuSockets $ranks) -}}
{{- end -}}
{{- end }}

{{/* Routers take 0.1 CPU each of what replicas leave. */}}
{{- define "paceline.checkRouters" -}}
{{- $values := .root.Values -}}
{{- $free := float64 $values.head.numCpus -}}
{{- range $name, $group := .groups -}}
{{- $used := 0.0 -}}
{{- range $role, $slots := $group.slots -}}
{{- $used = addf $used (mulf (get $values $role).numCpus $slots) -}}
{{- end -}}
{{- $free = addf $free (mulf (maxf 0 (subf $group.cpus $used)) $group.minReplicas $group.numOfHosts) -}}
{{- end -}}
{{- if lt $free (mulf 0.1 $values.routers) -}}
{{- fail (printf "routers: %v routers take %v CPUs and replicas leave %v in the groups' pods; raise groups.*.resources.requests.cpu, or lower target.numCpus" $values.routers (mulf 0.1 $values.routers) $free) -}}
{{- end -}}
{{- end }}
