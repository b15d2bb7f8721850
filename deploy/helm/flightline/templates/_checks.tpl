{{/* What the schema cannot say, since it is about two values at once. Included once, by server.yaml. */}}
{{- define "flightline.checks" -}}
{{- $v := .Values -}}
{{- if not (or $v.auth.apiKeysSecret $v.auth.allowNoKey) -}}
{{- fail "auth.apiKeysSecret is empty, so anybody could use the server: name a Secret with the key api-keys, or say auth.allowNoKey=true if something in front of it asks" -}}
{{- end -}}
{{- if not (or $v.image.tag $v.image.digest) -}}
{{- fail "image.tag and image.digest are empty: give one, so that all replicas run the same" -}}
{{- end -}}
{{- if or (eq $v.image.tag "latest") (eq $v.loadtest.image.tag "latest") -}}
{{- fail "image.tag=latest is another image tomorrow: give a fixed one" -}}
{{- end -}}
{{- if and $v.gpu.enabled (eq $v.engine.build "job") (not $v.gpu.product) -}}
{{- fail "gpu.product is empty and engine.build=job builds once for all replicas: name the GPU they all have (kubectl get nodes -L nvidia.com/gpu.product)" -}}
{{- end -}}
{{- $many := or (gt (int $v.replicas) 1) $v.autoscaling.enabled (gt (int $v.engine.nodes) 1) -}}
{{- range $name := list "engines" "hub" -}}
{{- $volume := index $v.storage $name -}}
{{- if and $many (eq $v.engine.build "job") (not $volume.existingClaim) (eq $volume.accessMode "ReadWriteOnce") -}}
{{- fail (printf "storage.%s.accessMode=ReadWriteOnce cannot be shared by several replicas: use ReadWriteMany, or engine.build=pod" $name) -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int $v.engine.dp) 1) (hasPrefix "trtllm" $v.engine.backend) -}}
{{- fail (printf "engine.dp=%d is for backend torch: with %s take more replicas" (int $v.engine.dp) $v.engine.backend) -}}
{{- end -}}
{{- if gt (int $v.engine.nodes) 1 -}}
{{- if ne $v.engine.backend "trtllm-engine" -}}
{{- fail (printf "engine.nodes=%d needs engine.backend=trtllm-engine, the one whose engine runs over several nodes" (int $v.engine.nodes)) -}}
{{- end -}}
{{- if ne $v.engine.build "job" -}}
{{- fail "engine.nodes above 1 needs engine.build=job: all nodes of an engine read the same files" -}}
{{- end -}}
{{- if mod (mul (int $v.engine.tp) (int $v.engine.pp)) (int $v.engine.nodes) -}}
{{- fail (printf "tp * pp = %d GPUs cannot be spread evenly over engine.nodes=%d" (mul (int $v.engine.tp) (int $v.engine.pp)) (int $v.engine.nodes)) -}}
{{- end -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (not $v.autoscaling.inFlightPerReplica) -}}
{{- fail "autoscaling.inFlightPerReplica is not set: measure it with 'flightline loadtest search' (docs/SCALE.md)" -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
{{- fail "autoscaling.minReplicas is above maxReplicas" -}}
{{- end -}}
{{- if and $v.inferencePool.enabled (not $v.inferencePool.endpointPicker) -}}
{{- fail "inferencePool.endpointPicker is empty: name the Service of the endpoint picker" -}}
{{- end -}}
{{- if and $v.loadtest.enabled (not $v.loadtest.image.repository) -}}
{{- fail "loadtest.image.repository is empty: build docker/loadtest.Dockerfile and push it" -}}
{{- end -}}
{{- if and $v.loadtest.enabled (not $v.loadtest.arms) (not (and $v.server.baseline $v.service.grpc)) -}}
{{- fail "the load test compares with hf_baseline over gRPC: set server.baseline and service.grpc, or name other sides in loadtest.arms" -}}
{{- end -}}
{{- if and (eq (int $v.strategy.maxSurge) 0) (eq (int $v.strategy.maxUnavailable) 0) -}}
{{- fail "strategy.maxSurge and strategy.maxUnavailable are both 0: no update could begin" -}}
{{- end -}}
{{- end }}
