#!/usr/bin/env bash
# Makes the secrets that overlays/local and overlays/staging need, with random values that stand
# nowhere but in the cluster. What is there already stays as it is. Arguments go to kubectl:
#   manifests/secrets.sh --context kind-tuneline
# A token for the model hub is yours to add:
#   kubectl -n kubeflow create secret generic tuneline-hub --from-file=token=FILE
set -euo pipefail

kubectl=(kubectl "$@")
random() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }

# NAMESPACE NAME KEY=VALUE...: through standard input, since every process can read a command line
make_secret() {
    local namespace=$1 name=$2 pair
    shift 2
    {
        printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: %s}\ndata:\n' "$name" "$namespace"
        for pair in "$@"; do
            printf '  %s: %s\n' "${pair%%=*}" "$(printf %s "${pair#*=}" | base64 | tr -d '\n')"
        done
    } | "${kubectl[@]}" create -f - > /dev/null
    echo "made $namespace/$name"
}

missing() { ! "${kubectl[@]}" -n "$1" get secret "$2" --output name > /dev/null 2>&1; }

value() { "${kubectl[@]}" -n "$1" get secret "$2" --output "jsonpath={.data.$3}" | base64 --decode; }

for namespace in kubeflow tuneline; do
    "${kubectl[@]}" get namespace "$namespace" --output name > /dev/null || {
        echo "error: namespace $namespace is not there: apply the objects of the cluster and manifests/base/namespace.yaml first" >&2
        exit 1
    }
done

if missing tuneline tuneline-mlflow-database; then
    make_secret tuneline tuneline-mlflow-database "password=$(random 24)"
fi
if missing tuneline tuneline-mlflow-admin; then
    make_secret tuneline tuneline-mlflow-admin username=tuneline "password=$(random 24)" \
        "flask_secret_key=$(random 32)"
fi
# steps and KFP's plugin are another user, which the job tuneline-mlflow-users makes
if missing tuneline tuneline-mlflow-steps; then
    make_secret tuneline tuneline-mlflow-steps username=tuneline-steps "password=$(random 24)"
fi
password=$(value tuneline tuneline-mlflow-steps password)
for name in tuneline-mlflow kfp-mlflow-credentials; do
    if missing kubeflow "$name"; then
        make_secret kubeflow "$name" username=tuneline-steps "password=$password"
    fi
done

# three identities of the object store: one that makes the buckets, and one for each bucket
if missing tuneline tuneline-object-store; then
    admin=$(random 24) mlflow=$(random 24) steps=$(random 24)
    identity='{"name":"%s","credentials":[{"accessKey":"%s","secretKey":"%s"}],"actions":[%s]}'
    of() { printf '"Read:%s","Write:%s","List:%s","Tagging:%s"' "$1" "$1" "$1" "$1"; }
    # shellcheck disable=SC2059  # the format is the line above
    identities=$(
        printf '{"identities":['
        printf "$identity," admin admin "$admin" '"Admin"'
        printf "$identity," mlflow mlflow "$mlflow" "$(of mlflow)"
        printf "$identity]}" tuneline tuneline "$steps" "$(of tuneline)"
    )
    make_secret tuneline tuneline-object-store "s3.json=$identities" \
        admin_access_key_id=admin "admin_secret_access_key=$admin" \
        mlflow_secret_access_key="$mlflow" "steps_secret_access_key=$steps"
fi
if missing tuneline tuneline-s3; then
    make_secret tuneline tuneline-s3 access_key_id=mlflow \
        "secret_access_key=$(value tuneline tuneline-object-store mlflow_secret_access_key)"
fi
if missing kubeflow tuneline-s3; then
    make_secret kubeflow tuneline-s3 access_key_id=tuneline \
        "secret_access_key=$(value tuneline tuneline-object-store steps_secret_access_key)"
fi

# those of Kubeflow Pipelines itself
if missing kubeflow mlpipeline-minio-artifact; then
    make_secret kubeflow mlpipeline-minio-artifact accesskey=kfp "secretkey=$(random 24)"
fi
if missing kubeflow mysql-secret; then
    make_secret kubeflow mysql-secret username=root "password=$(random 24)"
fi
