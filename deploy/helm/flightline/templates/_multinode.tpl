{{- define "flightline.groupEnv" -}}
- name: LWS_SET
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/name']"}}
- name: LWS_GROUP
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/group-index']"}}
- {name: GROUP, value: $(LWS_SET)-$(LWS_GROUP)}
{{- end }}

{{/* Open MPI takes its parameters from the environment; hosts are LWS's stable names. */}}
{{- define "flightline.multiNodeEnv" -}}
{{ include "flightline.groupEnv" . }}
{{- $gpus := include "flightline.gpusPerPod" . }}
{{- $name := printf "%s-nodes" (include "flightline.name" .) }}
{{- $hosts := list }}
{{- range $index := until (int .Values.engine.nodes) }}
{{- $host := ternary "$(GROUP)" (printf "$(GROUP)-%d" $index) (eq $index 0) }}
{{- $hosts = append $hosts (printf "%s.%s:%s" $host $name $gpus) }}
{{- end }}
- {name: FLIGHTLINE_MPI_HOSTS, value: {{ join "," $hosts | quote }}}
- {name: OMPI_MCA_plm_rsh_agent, value: ssh -F /run/mpi/ssh_config}
- {name: OMPI_MCA_mca_base_env_list, value: PATH;PYTHONPATH;LD_LIBRARY_PATH;HOME;HF_HOME;HF_HUB_OFFLINE}
{{- end }}

{{- define "flightline.mpiVolumes" -}}
- name: mpi
  projected:
    defaultMode: 0400
    sources:
      - configMap: {name: {{ include "flightline.name" . }}-mpi}
      - secret: {name: {{ include "flightline.name" . }}-mpi}
{{- end }}
