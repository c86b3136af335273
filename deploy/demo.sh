#!/usr/bin/env bash
# The main steps of SALT, small, on this machine: videos to shards, a teacher, a service that two students share, a cache that a third one
# reads, and what they learned. Each command is printed before it runs; `step` notes its time as well.
#   VIDEOS=DIR make demo   takes your own videos instead of made ones (without labels there is nothing to probe)
# Students learn from a teacher of made videos that was trained for two hours (deploy/pretrained); with your own videos, from the one here.
set -euo pipefail

OUT=${DEMO_OUT:-runs/demo}
STEPS=${DEMO_STEPS:-480}        # optimizer steps of the teacher and of each student, of 24 clips each
NUM_VIDEOS=${DEMO_VIDEOS:-4000} # made videos of the training split
VIEWS=1                         # pinned views per video: what lets runs, and epochs, share a target

# Only what an earlier demo made is removed; its first act is to write steps.tsv.
if [ -e "$OUT" ] && [ ! -f "$OUT/steps.tsv" ] && [ -n "$(ls -A "$OUT")" ]; then
  echo "error: got DEMO_OUT=$OUT, which is not empty and was not made by this demo, expected a new folder" >&2; exit 2
fi
rm -rf "$OUT" && mkdir -p "$OUT" && : > "$OUT/steps.tsv"
PRETRAINED=$(dirname "$0")/pretrained
SERVER=; STUDENT=
finish() { for pid in $STUDENT $SERVER; do kill -TERM "$pid" 2>/dev/null && wait "$pid" || true; done; }
trap finish EXIT; trap 'exit 130' INT; trap 'exit 143' TERM

step() { # step NAME COMMAND...: prints it, unless it is a function of this file, runs it and notes its seconds
  local name=$1 start=$SECONDS; shift
  printf '\n'
  [ "$(type -t "$1")" = function ] || printf '\033[1m$ %s\033[0m\n' "$*"
  "$@"
  printf '%s\t%s\n' "$name" $((SECONDS - start)) >> "$OUT/steps.tsv"
}

wait_for_url() { # ends when the service has printed its URL, or with the service
  while ! grep -qs http "$OUT/url"; do kill -0 "$SERVER" 2>/dev/null || { echo "the service ended before it was ready" >&2; return 1; }; sleep 0.2; done
  salt-serve status --url "$(cat "$OUT/url")" --wait 60 > /dev/null
}

# 1. Videos: made here, or yours.
if [ -z "${VIDEOS:-}" ]; then
  step synth salt-data synth "$OUT/videos" --num-train "$NUM_VIDEOS"
  VIDEOS=$OUT/videos; SHORT_SIDE=()
  CKPT=$PRETRAINED/teacher-30000-steps
  JUDGED=(--ckpt "$CKPT" --ckpt "$PRETRAINED/student-10000-steps") # beside those of this demo
else
  SHORT_SIDE=(--short-side 48) # small videos decode fast; a real run keeps the original bytes
  CKPT=$OUT/teacher; JUDGED=()
fi

# 2. WebDataset shards with an index.
step pack salt-data pack "$VIDEOS" "$OUT/shards" ${SHORT_SIDE[@]+"${SHORT_SIDE[@]}"}

# 3. Stage 1: the teacher learns by masked pixel reconstruction. `--workers 0` trains in this process, on both cores.
step teacher salt-train teacher --preset nano --data "$OUT/shards" --out "$OUT/teacher" --steps "$STEPS" --views "$VIEWS" --workers 0 --num-threads 2

# 4. The frozen teacher as a service; it prints its URL once it is ready.
printf '\n\033[1m$ salt-serve teacher --ckpt %s --port 0 --cpus 0.5 &\033[0m\n' "$CKPT"
salt-serve teacher --ckpt "$CKPT" --port 0 --cpus 0.5 > "$OUT/url" & SERVER=$!
step serve wait_for_url

# 5. Stage 2: two students of different size share it. With one data seed and pinned views, each clip is computed once.
two_students() {
  local student=(salt-train student --preset nano --data "$OUT/shards" --teacher-url "$(cat "$OUT/url")" --steps "$STEPS" --views "$VIEWS" --cpus-per-worker 0.5)
  printf '\033[1m$ %s\033[0m\n' "${student[*]} --out $OUT/student-a &" "${student[*]} --out $OUT/student-b --set encoder.depth=3"
  "${student[@]}" --out "$OUT/student-a" & STUDENT=$!
  "${student[@]}" --out "$OUT/student-b" --set encoder.depth=3
  wait "$STUDENT"; STUDENT=
}
step students two_students

# 6. What the service did, then it is no longer needed.
step status salt-serve status --url "$(cat "$OUT/url")"
salt-serve status --url "$(cat "$OUT/url")" --json > "$OUT/server.json"
kill -TERM "$SERVER"; wait "$SERVER"; SERVER=

# 7. The same targets on disk, and a student that needs no teacher at all. It is student-a again, and has the same losses to the last bit.
step precompute salt-serve precompute --ckpt "$CKPT" --data "$OUT/shards" --views "$VIEWS" --out "$OUT/targets"
step student_c salt-train student --preset nano --data "$OUT/shards" --targets "$OUT/targets" --out "$OUT/student-c" --steps "$STEPS" \
  --views "$VIEWS" --workers 0

# 8. What the frozen encoders know, and a page to look at.
step probe salt-eval probe --ckpt "$OUT/teacher" --ckpt "$OUT/student-a" --ckpt "$OUT/student-b" --ckpt "$OUT/student-c" --random-init \
  ${JUDGED[@]+"${JUDGED[@]}"} --data "$OUT/shards" --out "$OUT/probe.json" --epochs 20 --lr 0.003 --batch-size 128 --num-threads 2
if [ ${#JUDGED[@]} -gt 0 ]; then cat <<'WORDS'
An encoder learns motion first. In the first minutes of training its accuracy on digits falls below that of random weights; after about two
hours it is above. teacher-30000-steps saw 720,000 clips, student-10000-steps 960,000 (deploy/pretrained/README.md has their commands).
WORDS
fi
step report salt-eval report --runs "$OUT"
