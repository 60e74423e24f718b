{{- define "unroll.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "unroll.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "unroll.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "unroll.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "unroll.selector" -}}
app.kubernetes.io/name: {{ include "unroll.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "unroll.labels" -}}
{{ include "unroll.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "unroll.tlsSecret" -}}
{{- if .Values.tls.existingSecret }}{{ .Values.tls.existingSecret }}
{{- else if .Values.tls.cert }}{{ include "unroll.fullname" . }}-tls
{{- end }}
{{- end }}

{{- define "unroll.tokensSecret" -}}
{{- if .Values.tokens.existingSecret }}{{ .Values.tokens.existingSecret }}
{{- else if .Values.tokens.content }}{{ include "unroll.fullname" . }}-tokens
{{- end }}
{{- end }}

{{- /* The settings of the server: those given, and those that the chart owns. */ -}}
{{- define "unroll.settings" -}}
{{- $own := dict "models" (.Values.models.url | default "/models") "listen" "[::]:50051" "metrics" "[::]:9090" "admin" "127.0.0.1:50052" }}
{{- if .Values.models.url }}
{{- $_ := set $own "models_cache" "/models" }}
{{- end }}
{{- if include "unroll.tlsSecret" . }}
{{- $_ := set $own "tls_cert" "/etc/unroll/tls/tls.crt" }}
{{- $_ := set $own "tls_key" "/etc/unroll/tls/tls.key" }}
{{- if .Values.tls.verifyClients }}
{{- $_ := set $own "tls_client_ca" "/etc/unroll/tls/ca.crt" }}
{{- end }}
{{- end }}
{{- if include "unroll.tokensSecret" . }}
{{- $_ := set $own "tokens" "/etc/unroll/tokens/tokens" }}
{{- end }}
{{- if .Values.sessions.url }}
{{- $_ := set $own "sessions" .Values.sessions.url }}
{{- end }}
{{- toToml (merge $own (deepCopy .Values.settings)) }}
{{- end }}

{{- /* How a probe asks for health. The kubelet speaks gRPC without TLS only. Context: root, service. */ -}}
{{- define "unroll.probe" -}}
{{- if include "unroll.tlsSecret" .root }}
exec:
  command: [python, -m, unroll_server.healthcheck, "127.0.0.1:50051", --service, {{ .service | quote }}]
timeoutSeconds: 5
{{- else }}
grpc:
  port: 50051
  service: {{ .service | quote }}
timeoutSeconds: 3
{{- end }}
{{- end }}
