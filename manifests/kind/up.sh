#!/usr/bin/env bash
# A cluster in Docker with Kubeflow Pipelines, MLflow and tuneline's image, to try things on.
# Needs docker, kind and kubectl, 16 GB of memory, and the network: KFP's images come from theirs.
# Called again, it goes on where it stopped. `kind delete cluster --name tuneline` removes it all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

name=${KIND_CLUSTER:-tuneline}
kfp=2.17.0
image=${TUNELINE_IMAGE:-tuneline-cpu:$(sed -n 's/^__version__ = "\(.*\)"/\1/p' components/tuneline/__init__.py)-python3.11}
kubectl=(kubectl --context "kind-$name")

for tool in docker kind kubectl; do
    command -v "$tool" > /dev/null || { echo "error: $tool is not installed" >&2; exit 2; }
done

kind get clusters 2> /dev/null | grep -qx "$name" || kind create cluster --name "$name" --wait 5m
docker build -f images/cpu/Dockerfile -t "$image" .
kind load docker-image "$image" --name "$name"

# The kinds first, then what is secret, then all the rest.
"${kubectl[@]}" apply -k "github.com/kubeflow/pipelines/manifests/kustomize/cluster-scoped-resources?ref=$kfp"
"${kubectl[@]}" wait --for condition=established --timeout 120s crd/applications.app.k8s.io
"${kubectl[@]}" apply -f manifests/base/namespace.yaml
manifests/secrets.sh --context "kind-$name"

# jobs of an earlier call can't be changed
"${kubectl[@]}" -n tuneline delete job tuneline-mlflow-migrate tuneline-mlflow-users tuneline-object-store-buckets --ignore-not-found
kubectl kustomize manifests/overlays/local |
    sed "s|image: tuneline-cpu:.*\$|image: $image|" |
    "${kubectl[@]}" apply -f -

for deployment in kubeflow/ml-pipeline kubeflow/ml-pipeline-ui tuneline/tuneline-mlflow; do
    "${kubectl[@]}" -n "${deployment%/*}" rollout status "deployment/${deployment#*/}" --timeout 20m
done
# the user that steps are in MLflow
"${kubectl[@]}" -n tuneline wait --for=condition=complete job/tuneline-mlflow-users --timeout 10m

cat << END

KFP:     kubectl --context kind-$name -n kubeflow port-forward svc/ml-pipeline-ui 8080:80
MLflow:  kubectl --context kind-$name -n tuneline port-forward svc/tuneline-mlflow 5000:5000
then:    export KFP_HOST=http://localhost:8080 MLFLOW_TRACKING_URI=http://localhost:5000
         export MLFLOW_TRACKING_USERNAME=tuneline
         export MLFLOW_TRACKING_PASSWORD=\$(kubectl --context kind-$name -n tuneline get secret \\
             tuneline-mlflow-admin --output jsonpath={.data.password} | base64 --decode)
         export TUNELINE_IMAGE=$image
         tuneline publish && tuneline submit examples/demo.yaml --pool cpu --wait
tests:   make e2e
END
