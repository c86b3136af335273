"""The fields of KubeRay's resources that people write, by KubeRay's API reference (ray.io/v1, with ``authOptions`` of release 1.5) as a JSON schema.

Pod templates are Kubernetes' own, and are left to its schemas. The whole CRDs are 1 MB each, most of it pod templates again.
"""

from typing import Any

TEXT, FLAG, COUNT, NUMBER, ANY = (
    {"type": "string"},
    {"type": "boolean"},
    {"type": "integer", "minimum": 0},
    {"type": "number"},
    {"type": "object"},
)
TEXTS = {"type": "object", "additionalProperties": TEXT}


def _object(*required: str, **fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": fields}


def _one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


_HEAD = _object(
    "template",
    template=ANY,
    headService=ANY,
    enableIngress=FLAG,
    rayStartParams=TEXTS,
    serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)
_WORKERS = _object(
    "groupName",
    "maxReplicas",
    "minReplicas",
    "template",
    suspend=FLAG,
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    template=ANY,
    scaleStrategy=ANY,
    numOfHosts=COUNT,
)
_CLUSTER = _object(
    "headGroupSpec",
    suspend=FLAG,
    managedBy=TEXT,
    autoscalerOptions=_object(
        resources=ANY,
        image=TEXT,
        imagePullPolicy=TEXT,
        securityContext=ANY,
        idleTimeoutSeconds=COUNT,
        upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
        version=_one_of("v1", "v2"),
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
    ),
    authOptions=_object(mode=_one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANY,
    headGroupSpec=_HEAD,
    rayVersion=TEXT,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
SPECS = {
    "RayService": _object(
        serveService=ANY,
        upgradeStrategy=_object(type=_one_of("NewCluster", "None")),
        serveConfigV2=TEXT,
        rayClusterConfig=_CLUSTER,
        excludeHeadPodFromServeSvc=FLAG,
    ),
    "RayJob": _object(
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=_CLUSTER,
        submitterPodTemplate=ANY,
        metadata=TEXTS,
        clusterSelector=TEXTS,
        submitterConfig=_object(backoffLimit=COUNT),
        managedBy=TEXT,
        deletionStrategy=ANY,
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        jobId=TEXT,
        submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode"),
        entrypointResources=TEXT,
        entrypointNumCpus=NUMBER,
        entrypointNumGpus=NUMBER,
        ttlSecondsAfterFinished=COUNT,
        shutdownAfterJobFinishes=FLAG,
        suspend=FLAG,
    ),
}
