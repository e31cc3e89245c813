{{- define "dcar.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "dcar.name" -}}
{{ contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" (trunc 47 .Release.Name) .Chart.Name) | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "dcar.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .Values.pod }}
{{ toYaml . }}
{{- end }}
volumes:
  - {name: tmp, emptyDir: {sizeLimit: 1Gi}}
  - {name: cache, emptyDir: {sizeLimit: {{ .Values.cacheSize | quote }}}}
{{- end }}

{{- /* Volumes of the service and the job alone, which the test does not wait for. */}}
{{- define "dcar.volumes" -}}
{{- with .Values.gallery.claim }}
- {name: gallery, persistentVolumeClaim: {claimName: {{ quote . }}, readOnly: true}}
{{- end }}
{{- range $i, $path := keys .Values.mounts | sortAlpha }}
- {{ merge (dict "name" (printf "mount-%d" $i)) (get $.Values.mounts $path) | toJson }}
{{- end }}
{{- end }}

{{- define "dcar.index-volume" -}}
{{- with .Values.index.claim -}}
- {name: index, persistentVolumeClaim: {claimName: {{ quote . }}}}
{{- else -}}
- {name: index, emptyDir: {}}
{{- end }}
{{- end }}

{{- define "dcar.image" -}}
{{- with .Values.image }}{{ .repository }}{{ .digest | empty | ternary (printf ":%s" (default $.Chart.AppVersion .tag)) (printf "@%s" .digest) }}{{ end }}
{{- end }}

{{- define "dcar.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "dcar.index" -}}
{{ .Values.index.url | default (printf "/data/%s" .Values.index.path) }}
{{- end }}

{{- /* Not empty for a setting that is neither absent nor false, by the spellings of the service. */}}
{{- define "dcar.is-on" -}}
{{- if not (has (lower (toString .)) (list "" "<nil>" "false" "f" "0" "off" "no" "n")) }}on{{ end }}
{{- end }}

{{- /* Not empty if the service writes feedback to the volume of the index. */}}
{{- define "dcar.writes-feedback" -}}
{{- if not .Values.feedbackClaim }}{{ include "dcar.is-on" .Values.settings.feedback }}{{ end }}
{{- end }}

{{- define "dcar.credentials" -}}
{{- with .Values.index.credentials -}}
envFrom: [{secretRef: {name: {{ quote . }}}}]
{{- end }}
{{- end }}

{{- /* A container's variables, from a list: the root, and defaults, before which the values of `env` come. */}}
{{- define "dcar.variables" -}}
{{- $variables := index . 1 }}
{{- range $name, $value := (index . 0).Values.env }}{{ $_ := set $variables $name $value }}{{ end }}
{{- range $name, $value := $variables }}
- {name: {{ quote $name }}, value: {{ kindIs "float64" $value | ternary (toJson $value) (toString $value) | quote }}}
{{- end }}
{{- end }}

{{- define "dcar.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- if .Values.gallery.claim }}
- {name: gallery, mountPath: {{ .Values.gallery.path | quote }}, readOnly: true}
{{- end }}
{{- range $i, $path := keys .Values.mounts | sortAlpha }}
- {name: mount-{{ $i }}, mountPath: {{ $path | quote }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "dcar.rebuild" -}}
image: {{ .Values.rebuild.image | default (include "dcar.image" .) | quote }}
command: [python, -m, index_jobs.rebuild]
args: {{ concat .Values.rebuild.args (list "--out" (include "dcar.index" .)) | toJson }}
{{ include "dcar.credentials" . }}
{{- $kept := ternary (dict "HF_HOME" "/data/hub") dict (not (empty .Values.index.claim)) }}
{{- if and .Values.index.claim .Values.index.url }}{{ $_ := set $kept "DCAR_RUNTIME_CACHE" "/data" }}{{ end }}
{{- with include "dcar.variables" (list . $kept) }}
env: {{- . | nindent 2 }}
{{- end }}
volumeMounts:
  {{- if or .Values.index.claim (not .Values.index.url) }}
  - {name: index, mountPath: /data}
  {{- end }}
  {{- include "dcar.mounts" . | nindent 2 }}
{{- end }}
