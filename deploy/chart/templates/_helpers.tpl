{{- define "nbgpu.name" -}}
{{- if contains "nbgpu" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-nbgpu" (.Release.Name | trunc 34 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "nbgpu.labels" -}}
app.kubernetes.io/name: nbgpu
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* selector of one part: (list . "pool") */}}
{{- define "nbgpu.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: nbgpu
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* image of one part: (list . "pool") */}}
{{- define "nbgpu.image" -}}
{{- $root := index . 0 -}}{{- $image := index $root.Values.images (index . 1) -}}
{{ $image.name }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end }}

{{- define "nbgpu.sealSecret" -}}
{{ .Values.seal.existingSecret | default (printf "%s-seal" (include "nbgpu.name" .)) }}
{{- end }}

{{- define "nbgpu.readSecret" -}}
{{ .Values.pool.readTokenSecret | default (printf "%s-read-token" (include "nbgpu.name" .)) }}
{{- end }}

{{/* the Secret in this namespace that holds a hub's token: (list . $hub) */}}
{{- define "nbgpu.hubSecret" -}}
{{- $root := index . 0 -}}{{- $hub := index . 1 -}}
{{ $hub.existingSecret | default (printf "%s-hub-%s" (include "nbgpu.name" $root) $hub.name) }}
{{- end }}

{{- define "nbgpu.hubNamespace" -}}
{{- $root := index . 0 -}}{{- $hub := index . 1 -}}
{{ $hub.namespace | default $root.Release.Namespace }}
{{- end }}

{{/* a secret's value: what is there stays, over every upgrade; else a new one: (list . NAMESPACE NAME KEY) */}}
{{- define "nbgpu.kept" -}}
{{- $there := lookup "v1" "Secret" (index . 1) (index . 2) -}}
{{- $data := get ($there | default dict) "data" | default dict -}}
{{- get $data (index . 3) | default (randAlphaNum 48 | b64enc) -}}
{{- end }}

{{/* namespaces of all hubs' servers, as a JSON list; ["*"] when any is "*" */}}
{{- define "nbgpu.serverNamespaces" -}}
{{- $all := list -}}
{{- range $hub := .Values.hubs -}}
{{- $all = concat $all ($hub.serverNamespaces | default (list (include "nbgpu.hubNamespace" (list $ $hub)))) -}}
{{- end -}}
{{- if has "*" $all }}{{ list "*" | toJson }}{{ else }}{{ $all | uniq | toJson }}{{ end }}
{{- end }}

{{- define "nbgpu.poolUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "nbgpu.name" . }}-pool
{{- end }}

{{- define "nbgpu.agentUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "nbgpu.name" . }}-agent
{{- end }}
