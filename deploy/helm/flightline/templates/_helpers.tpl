{{- define "flightline.name" -}}
{{- .Values.nameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "flightline.selector" -}}
app.kubernetes.io/name: flightline
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "flightline.labels" -}}
{{ include "flightline.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Of an image's values. */}}
{{- define "flightline.image" -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag }}
{{- end -}}
{{- end }}

{{- define "flightline.scheme" -}}
{{ ternary "HTTPS" "HTTP" (ne .Values.auth.tlsSecret "") }}
{{- end }}

{{- define "flightline.gpusPerPod" -}}
{{- $e := .Values.engine -}}
{{ div (mul (int $e.tp) (int $e.pp) (int $e.dp)) (int $e.nodes) }}
{{- end }}

{{/* All that decides what a build makes, the GPU in front: two releases that agree in it share an engine. */}}
{{- define "flightline.engineKey" -}}
{{- $content := list (include "flightline.image" .Values.image) .Values.model (omit .Values.engine "build") .Values.server.baseline | toJson | sha256sum | trunc 16 -}}
{{- $gpu := ternary (.Values.gpu.product | lower | replace "." "-" | replace "_" "-" | trunc 24 | trimSuffix "-") "cpu" .Values.gpu.enabled -}}
{{ printf "%s-%s" ($gpu | default "gpu") $content }}
{{- end }}

{{/* The longest a stop can take: the routers' time, the drain, then what the supervisor gives each process it ends
(5 s an engine, Triton, a gateway process), and 10 s over. */}}
{{- define "flightline.graceSeconds" -}}
{{- $s := .Values.server -}}
{{ add (int $s.preStopSeconds) (int $s.drainSeconds) (mul 5 (int .Values.engine.dp)) 5 (mul 5 (int $s.gatewayProcesses)) 10 }}
{{- end }}

{{- define "flightline.claim" -}}
{{- $volume := index .root.Values.storage .volume -}}
{{ $volume.existingClaim | default (printf "%s-%s" (include "flightline.name" .root) .volume) }}
{{- end }}

{{- define "flightline.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "flightline.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 1000
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "flightline.resources" -}}
{{- $gpus := include "flightline.gpusPerPod" . | int -}}
requests:
  {{- toYaml .Values.resources.requests | nindent 2 }}
  {{- if .Values.gpu.enabled }}
  {{ .Values.gpu.resource }}: {{ $gpus }}
  {{- end }}
limits:
  {{- toYaml .Values.resources.limits | nindent 2 }}
  {{- if .Values.gpu.enabled }}
  {{ .Values.gpu.resource }}: {{ $gpus }}
  {{- end }}
{{- end }}

{{- define "flightline.buildEnv" -}}
- {name: FLIGHTLINE_MODEL, value: {{ .Values.model | quote }}}
- {name: FLIGHTLINE_ENGINE, value: {{ .Values.engine.backend | quote }}}
- {name: FLIGHTLINE_PRECISION, value: {{ .Values.engine.precision | quote }}}
{{- with .Values.engine.maxSeqLen }}
- {name: FLIGHTLINE_MAX_SEQ_LEN, value: {{ . | int | quote }}}
{{- end }}
{{- with .Values.engine.maxBatchSize }}
- {name: FLIGHTLINE_MAX_BATCH_SIZE, value: {{ . | int | quote }}}
{{- end }}
{{- with .Values.engine.maxNumTokens }}
- {name: FLIGHTLINE_MAX_NUM_TOKENS, value: {{ . | int | quote }}}
{{- end }}
- {name: FLIGHTLINE_TP, value: {{ .Values.engine.tp | quote }}}
- {name: FLIGHTLINE_PP, value: {{ .Values.engine.pp | quote }}}
- {name: FLIGHTLINE_DP, value: {{ .Values.engine.dp | quote }}}
{{- if .Values.auth.hubTokenSecret }}
- {name: HF_TOKEN_PATH, value: /run/secrets/hub/token}
{{- end }}
{{- with .Values.engine.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "flightline.serveEnv" -}}
- {name: FLIGHTLINE_HOST, value: 0.0.0.0}
- {name: FLIGHTLINE_DRAIN_S, value: {{ .Values.server.drainSeconds | quote }}}
- {name: FLIGHTLINE_START_TIMEOUT_S, value: {{ .Values.server.startupSeconds | int | quote }}}
- {name: FLIGHTLINE_GATEWAY_PROCESSES, value: {{ .Values.server.gatewayProcesses | quote }}}
- {name: FLIGHTLINE_MAX_IN_FLIGHT, value: {{ .Values.server.maxInFlight | quote }}}
- {name: FLIGHTLINE_SERVE_BASELINE, value: {{ ternary "1" "0" .Values.server.baseline | quote }}}
- {name: FLIGHTLINE_METRICS_WITHOUT_KEY, value: {{ ternary "1" "0" .Values.auth.metricsWithoutKey | quote }}}
{{- with .Values.server.servedNames }}
- {name: FLIGHTLINE_SERVED_MODEL_NAME, value: {{ join "," . | quote }}}
{{- end }}
{{- if .Values.auth.apiKeysSecret }}
- {name: FLIGHTLINE_API_KEYS_FILE, value: /run/secrets/keys/api-keys}
{{- else }}
- {name: FLIGHTLINE_ALLOW_NO_KEY, value: "1"}
{{- end }}
{{- if .Values.auth.tlsSecret }}
- {name: FLIGHTLINE_TLS_CERT, value: /run/secrets/tls/tls.crt}
- {name: FLIGHTLINE_TLS_KEY, value: /run/secrets/tls/tls.key}
{{- end }}
- {name: LOG_FORMAT, value: json}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- with .Values.server.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The container that builds, in the Job or in front of a server. */}}
{{- define "flightline.builder" -}}
name: build
image: {{ include "flightline.image" .Values.image | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: ["/bin/sh", "-c"]
# The folder run is where each server mounts its own: it must be there, since servers see the rest read-only.
args: ["mkdir -p /engines/run && exec python3 -m flightline.engine_build --build-dir /engines"]
env:
  {{- include "flightline.buildEnv" . | nindent 2 }}
resources:
  {{- include "flightline.resources" . | nindent 2 }}
securityContext:
  {{- include "flightline.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: engines, mountPath: /engines{{ if eq .Values.engine.build "job" }}, subPath: {{ include "flightline.engineKey" . }}{{ end }}}
  - {name: hub, mountPath: /cache/huggingface}
  - {name: home, mountPath: /cache/home}
  - {name: tmp, mountPath: /tmp}
  - {name: shm, mountPath: /dev/shm}
  {{- if .Values.storage.checkpoints.existingClaim }}
  - {name: checkpoints, mountPath: /models, readOnly: true}
  {{- end }}
  {{- if .Values.auth.hubTokenSecret }}
  - {name: hub-token, mountPath: /run/secrets/hub, readOnly: true}
  {{- end }}
{{- end }}

{{/* Volumes of what builds and of what serves. */}}
{{- define "flightline.volumes" -}}
{{- $root := . -}}
{{- range $volume := list "engines" "hub" }}
- name: {{ $volume }}
  {{- if eq $root.Values.engine.build "job" }}
  persistentVolumeClaim: {claimName: {{ include "flightline.claim" (dict "root" $root "volume" $volume) }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
- name: home
  emptyDir: {}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.shmSize }}}
{{- with .Values.storage.checkpoints.existingClaim }}
- name: checkpoints
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}

{{/* Only where a build runs: the server never sees the token. */}}
{{- define "flightline.buildVolumes" -}}
{{- with .Values.auth.hubTokenSecret }}
- name: hub-token
  secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: token, path: token}]}
{{- end }}
{{- end }}

{{/* PromQL's choice of this release's servers. */}}
{{- define "flightline.series" -}}
{{- $pod := ternary "%s-[0-9a-f]{6,10}-[0-9a-z]{5}" "%s-nodes-[0-9]+" (eq (int .Values.engine.nodes) 1) -}}
{{ printf "namespace=%q, pod=~%q" .Release.Namespace (printf $pod (include "flightline.name" .)) }}
{{- end }}

{{/* Where pods of this release may run. */}}
{{- define "flightline.placement" -}}
{{- $selector := deepCopy .Values.nodeSelector -}}
{{- if and .Values.gpu.enabled .Values.gpu.product -}}
{{- $_ := set $selector "nvidia.com/gpu.product" .Values.gpu.product -}}
{{- end -}}
{{- with $selector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
