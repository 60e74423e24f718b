#!/bin/sh
# Trains and exports a model into the repository /models, unless a version of it is there.
# train-once NAME OPTION...: NAME is the model's, the options are unroll-train's.
set -eu
name=$1
shift
for manifest in "/models/$name"/[1-9]*/manifest.json; do
    if [ -e "$manifest" ]; then
        echo "train-once: ${manifest%/manifest.json} is there already"
        exit 0
    fi
done
unroll-train --out "/tmp/runs/$name" "$@"
unroll-export "/tmp/runs/$name" --out "/models/$name"
