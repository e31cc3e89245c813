#!/bin/sh
# The compose file, walked from outside, through nginx: up, search by text and by picture, the cache, without Redis, up
# again; then the profile replicas: searches during a publication and without one of the services, which Prometheus
# scrapes; down.
#
#   tests/e2e/compose_walk.sh                           with `docker compose`
#   COMPOSE=podman-compose tests/e2e/compose_walk.sh    with podman-compose (UP_ARGS= for options of its own)
#
# A project and volumes of its own, removed at the end; the variables of docker-compose.yml apply. Status 0: all held.
set -eu
cd "$(dirname "$0")/../.."
export DCAR_PORT_PUBLISHED="${DCAR_PORT_PUBLISHED:-18000}"
URL="http://127.0.0.1:$DCAR_PORT_PUBLISHED"
compose="${COMPOSE:-docker compose} -p dcar-walk"
both="$compose --profile replicas"
all="$both --profile monitoring"
helper=""
folder=$(mktemp -d)

finish() {
    status=$?
    trap - EXIT
    touch "$folder/stop"
    [ "$status" = 0 ] || $both logs || true
    $all down --volumes >/dev/null 2>&1 || true
    [ -z "$helper" ] || kill "$helper" 2>/dev/null || true
    rm -rf "$folder"
    [ "$status" = 0 ] && echo "all held" || echo "FAILED"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Podman leaves the schedule of healthchecks to systemd; where there is none, this runs them.
case "$compose" in *podman*) if [ ! -d /run/systemd/system ]; then
    while sleep 2; do
        podman ps --quiet --filter name=dcar-walk | xargs -r -n 1 podman healthcheck run || true
    done >/dev/null 2>&1 &
    helper=$!
fi ;; esac

hold() { # hold WHAT PATTERN: the pattern is in what is on stdin
    answer=$(cat)
    case "$answer" in
    *"$2"*) echo "ok    $1" ;;
    *) echo "WRONG $1: no $2 in: $answer"; exit 1 ;;
    esac
}
text() {
    curl -s --max-time 30 "$URL/search/text" -H 'content-type: application/json' -d "{\"query\": \"$1\", \"k\": 5}"
}
ready() {
    tries=0
    until curl -fs --max-time 5 "$URL/readyz" >/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 120 ] || { echo "WRONG not ready after two minutes"; exit 1; }
        sleep 1
    done
}

index_file() { # its inode and time: an index that is made anew has others
    $compose exec -T api stat -c '%i %Y' "/data/index/${DCAR_DOMAIN:-twemoji}/versions/1.json"
}

$all down --volumes >/dev/null 2>&1 || true # of a walk that was killed
$compose up -d ${UP_ARGS:-}
ready
curl -s "$URL/readyz" | hold "ready" '"status":"ready"'
curl -s "$URL/" | hold "the search page" '<html'
text "crying cat" | hold "text, first" '"cached":false'
sleep 1 # the cache is written behind the answer
text "crying cat" | hold "text, from the cache" '"cached":true'
curl -s "$URL/search/image" -F file=@examples/emoji/query.png -F k=1 | hold "picture" '"rank":1'
$compose exec -T redis redis-cli --scan | hold "the cache is in Redis" "dcar:"
$compose exec -T api id | hold "not root" "uid=10001"
curl -s -o /dev/null -w '%{http_code}' "$URL/search/text" -H 'content-type: application/json' -d '{"query": ""}' |
    hold "a bad query" 422
curl -s -o /dev/null -w '%{http_code}' "$URL/metrics" | hold "metrics are not for strangers" 403

$compose kill redis >/dev/null 2>&1
text "red apple" | hold "without Redis" '"rank":1'
$compose start redis >/dev/null 2>&1
$compose exec -T redis redis-cli flushall >/dev/null
tries=0
until text "green apple $tries" >/dev/null; sleep 1; $compose exec -T redis redis-cli --scan | grep -q dcar:; do
    tries=$((tries + 1))
    [ "$tries" -lt 60 ] || { echo "WRONG Redis that is back is not written to"; exit 1; }
done
echo "ok    Redis that is back is written to again"

made=$(index_file)
$compose down >/dev/null 2>&1
$compose up -d ${UP_ARGS:-}
ready
index_file | hold "up again reuses the index" "$made"

version() { # version N: it has answered twenty times in a row
    tries=0 same=0
    while [ "$same" -lt 20 ]; do
        case $(curl -s --max-time 5 "$URL/readyz") in
        *"\"index_version\":$1,"*) same=$((same + 1)) ;;
        *) same=0 ;;
        esac
        tries=$((tries + 1))
        [ "$tries" -lt 600 ] || { echo "WRONG version $1 is not served by all"; exit 1; }
        sleep 0.2
    done
    echo "ok    both serve version $1"
}
unfailed() { # unfailed WHEN: no search has failed, twenty of them from now on
    seen=$(wc -l <"$folder/statuses")
    until [ "$(wc -l <"$folder/statuses")" -ge $((seen + 20)) ]; do sleep 0.2; done
    [ "$(sort -u "$folder/statuses")" = 200 ] || { echo "WRONG $1:"; sort "$folder/statuses" | uniq -c; exit 1; }
    echo "ok    no search fails $1"
}

$both up -d ${UP_ARGS:-}
$all up -d ${UP_ARGS:-} prometheus
tries=0
until $both exec -T api python -ISc 'import urllib.request as r
print(r.urlopen("http://prometheus:9090/api/v1/query?query=count(dcar_index_version)").read())' 2>/dev/null | grep -q '"2"'; do
    tries=$((tries + 1))
    [ "$tries" -lt 60 ] || { echo "WRONG Prometheus does not scrape both"; exit 1; }
    sleep 1
done
echo "ok    Prometheus scrapes both"
$both exec -T nginx nginx -s reload
while [ ! -e "$folder/stop" ]; do
    number=$((${number:-0} + 1))
    curl -s -o /dev/null -w '%{http_code}\n' --max-time 30 "$URL/search/text" -H 'content-type: application/json' \
        -d "{\"query\": \"cat $number\"}" >>"$folder/statuses" || true
done &
emoji=examples/emoji/${DCAR_DOMAIN:-twemoji}
$both run --rm index python -m index_jobs.rebuild --gallery "$emoji" --checkpoint "$emoji/checkpoint" --force \
    --out "/data/index/${DCAR_DOMAIN:-twemoji}" >/dev/null
version 2
unfailed "during a publication"
$both kill replica >/dev/null 2>&1
unfailed "without one of the services"
$both start replica >/dev/null 2>&1
tries=0
until $both exec -T replica python -ISc 'import urllib.request as r; r.urlopen("http://127.0.0.1:8000/readyz")' \
    >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 60 ] || { echo "WRONG the service that is back is not ready"; exit 1; }
    sleep 1
done
$both kill api >/dev/null 2>&1
unfailed "once that one is back and the other is gone"
