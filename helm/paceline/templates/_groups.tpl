{{/* Lays the map `over` on the map `base`, in place. Sprig's own merge drops what is empty: 0, false and "". */}}
{{- define "paceline.merge" -}}
{{- $base := .base -}}
{{- range $key, $value := .over -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $base $key)) -}}
{{- include "paceline.merge" (dict "base" (get $base $key) "over" $value) -}}
{{- else -}}
{{- $_ := set $base $key (kindIs "map" $value | ternary (deepCopy $value) $value) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Lays the pod settings `over` on `base`, in place: as above, but lists of pods are put behind those of `base`. */}}
{{- define "paceline.overlay" -}}
{{- $base := .base -}}
{{- $lists := dict -}}
{{- range $key, $value := .over -}}
{{- if and (kindIs "slice" $value) (kindIs "slice" (get $base $key)) -}}
{{- $_ := set $lists $key (concat (get $base $key) $value) -}}
{{- end -}}
{{- end -}}
{{- include "paceline.merge" (dict "base" $base "over" .over) -}}
{{- include "paceline.merge" (dict "base" $base "over" $lists) -}}
{{- end }}

{{/* Settings of the head's pod, as YAML. */}}
{{- define "paceline.head" -}}
{{- $head := deepCopy .Values.pods -}}
{{- include "paceline.overlay" (dict "base" $head "over" .Values.head) -}}
{{- toYaml $head -}}
{{- end }}

{{/* Settings of all groups by name, complete, as YAML; none for drafts if there are no drafts. What is derived from others is under keys of its own:
cpus (of a pod, whole ones), slots (ranks that a pod has room for, by role), requests and limits. */}}
{{- define "paceline.groups" -}}
{{- $groups := dict -}}
{{- range $name, $own := .Values.groups -}}
{{- $group := deepCopy $.Values.pods -}}
{{- include "paceline.overlay" (dict "base" $group "over" $.Values.groupDefaults) -}}
{{- include "paceline.overlay" (dict "base" $group "over" $own) -}}
{{- $_ := set $group "cpus" (include "paceline.cpus" (dict "root" $ "name" $name "group" $group) | int) -}}
{{- $_ := set $group "slots" (include "paceline.slots" (dict "root" $ "name" $name "group" $group) | fromYaml) -}}
{{- if or $.Values.draft.enabled (ne $group.role "draft") -}}
{{- $_ := set $groups $name $group -}}
{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end }}

{{/* Whole CPUs that a pod of the group requests, at least one. KubeRay would count its limit, rounded up. */}}
{{- define "paceline.cpus" -}}
{{- $cpu := dig "requests" "cpu" "" .group.resources | default (dig "limits" "cpu" "" .group.resources) | toString -}}
{{- if not $cpu -}}
{{- fail (printf "groups.%s.resources.requests.cpu: set it; replicas find as many CPUs in a pod as it requests" .name) -}}
{{- end -}}
{{- if not (regexMatch "^[0-9]+(\\.[0-9]+)?m?$" $cpu) -}}
{{- fail (printf "groups.%s.resources.requests.cpu: %s is no number of CPUs; write 4, 3.5 or 3500m" .name $cpu) -}}
{{- end -}}
{{- if hasSuffix "m" $cpu -}}
{{- max 1 (floor (divf (trimSuffix "m" $cpu | float64) 1000)) -}}
{{- else -}}
{{- max 1 (floor (float64 $cpu)) -}}
{{- end -}}
{{- end }}

{{/* Ranks of targets and of drafts that a pod of the group has room for, as YAML: what it offers of Ray's resources
paceline_target and paceline_draft, of which each rank takes one. */}}
{{- define "paceline.slots" -}}
{{- $hosts := int .group.numOfHosts -}}
{{- range $role := list "target" "draft" -}}
{{- if has $.group.role (list $role "any") -}}
{{- $ranks := mul $.group.replicasPerPod (get $.root.Values $role).tensorParallelSize -}}
{{- if mod $ranks $hosts -}}
{{- fail (printf "groups.%s.numOfHosts: %d ranks of a %s cannot be spread evenly over %d pods; change %s.tensorParallelSize or numOfHosts" $.name $ranks $role $hosts $role) -}}
{{- end }}
{{ $role }}: {{ div $ranks $hosts }}
{{- end -}}
{{- end -}}
{{- end }}
