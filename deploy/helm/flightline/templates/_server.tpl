{{/* The pod that serves: gateway, Triton and engine, which one supervisor keeps running. */}}
{{- define "flightline.serverPod" -}}
metadata:
  labels:
    {{- include "flightline.labels" . | nindent 4 }}
    app.kubernetes.io/component: server
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    flightline/engine: {{ include "flightline.engineKey" . }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  # Somebody must collect what Triton's processes leave behind: the pod's own first process does.
  shareProcessNamespace: true
  terminationGracePeriodSeconds: {{ include "flightline.graceSeconds" . }}
  securityContext:
    {{- include "flightline.podSecurity" . | nindent 4 }}
  {{- include "flightline.placement" . | nindent 2 }}
  {{- if .Values.spread.topologyKeys }}
  topologySpreadConstraints:
    {{- range .Values.spread.topologyKeys }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: {{ $.Values.spread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "flightline.selector" $ | nindent 10 }}
          app.kubernetes.io/component: server
    {{- end }}
  {{- end }}
  {{- if eq .Values.engine.build "pod" }}
  initContainers:
    - {{- include "flightline.builder" . | nindent 6 }}
  {{- end }}
  containers:
    - name: server
      image: {{ include "flightline.image" .Values.image | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: ["python3", "-m", "flightline.supervisor.serve", "--build-dir", "/engines"]
      env:
        {{- include "flightline.serveEnv" . | nindent 8 }}
        {{- if gt (int .Values.engine.nodes) 1 }}
        {{- include "flightline.multiNodeEnv" . | nindent 8 }}
        {{- end }}
      ports:
        - {name: http, containerPort: 8000}
        - {name: grpc, containerPort: 8001}
        - {name: metrics, containerPort: 8002}
      # Loading may take an hour. A token must have come out of the model.
      startupProbe:
        httpGet: {path: /health/ready, port: http, scheme: {{ include "flightline.scheme" . }}}
        periodSeconds: 10
        timeoutSeconds: 15
        failureThreshold: {{ div (add (int .Values.server.startupSeconds) 9) 10 }}
      # A token has just come out of the model; false as soon as the server stops.
      readinessProbe:
        httpGet: {path: /health/ready, port: http, scheme: {{ include "flightline.scheme" . }}}
        periodSeconds: 5
        timeoutSeconds: 15
        failureThreshold: 2
      # The gateway's event loop turns, however busy the engine is. What is stuck behind it, the supervisor restarts.
      livenessProbe:
        httpGet: {path: /health, port: http, scheme: {{ include "flightline.scheme" . }}}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      lifecycle:
        preStop:
          sleep: {seconds: {{ .Values.server.preStopSeconds }}}
      resources:
        {{- include "flightline.resources" . | nindent 8 }}
      securityContext:
        {{- include "flightline.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: engines, mountPath: /engines, readOnly: true{{ if eq .Values.engine.build "job" }}, subPath: {{ include "flightline.engineKey" . }}{{ end }}}
        {{- if gt (int .Values.engine.nodes) 1 }}
        - {name: engines, mountPath: /engines/run, subPathExpr: run/$(GROUP)}
        {{- else }}
        - {name: run, mountPath: /engines/run}
        {{- end }}
        - {name: hub, mountPath: /cache/huggingface, readOnly: true}
        - {name: home, mountPath: /cache/home}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if .Values.storage.checkpoints.existingClaim }}
        - {name: checkpoints, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if .Values.auth.apiKeysSecret }}
        - {name: keys, mountPath: /run/secrets/keys, readOnly: true}
        {{- end }}
        {{- if .Values.auth.tlsSecret }}
        - {name: tls, mountPath: /run/secrets/tls, readOnly: true}
        {{- end }}
        {{- if gt (int .Values.engine.nodes) 1 }}
        - {name: mpi, mountPath: /run/mpi, readOnly: true}
        {{- end }}
  volumes:
    {{- include "flightline.volumes" . | nindent 4 }}
    {{- if eq .Values.engine.build "pod" }}
    {{- include "flightline.buildVolumes" . | nindent 4 }}
    {{- end }}
    {{- if eq (int .Values.engine.nodes) 1 }}
    - name: run
      emptyDir: {}
    {{- else }}
    {{- include "flightline.mpiVolumes" . | nindent 4 }}
    {{- end }}
    {{- with .Values.auth.apiKeysSecret }}
    - name: keys
      secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: api-keys, path: api-keys}]}
    {{- end }}
    {{- with .Values.auth.tlsSecret }}
    - name: tls
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
{{- end }}
