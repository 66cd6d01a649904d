#!/usr/bin/env bash
# Start one payment with curl and openssl alone, and check the answer's signature: by_hand.sh ORDER_ID AMOUNT
#   SERVICE    base URL of the handler service for this caller: https://payments.example/c/shop
#   START_KEY  the key that both sides have as k1, base64url
# Prints the answer if its signature is valid. There is no callback: repeat the command to get the payment's state.
set -euo pipefail
set -f # a component of a signature is not a file name
answer=$(mktemp -d)
trap 'rm -r "$answer"' EXIT

key=$(printf %s "$START_KEY" | tr -- '-_' '+/')
while [ $((${#key} % 4)) -ne 0 ]; do key+="="; done
key=$(printf %s "$key" | openssl base64 -d -A | od -An -v -tx1 | tr -d ' \n')
mac() { openssl dgst -sha256 -mac HMAC -macopt "hexkey:$key" -binary | openssl base64 -A; }
digest() { printf 'sha-256=:%s:' "$(openssl dgst -sha256 -binary | openssl base64 -A)"; }

# The request: one line for each covered component, then the parameters, without a line break at the end.
url="$SERVICE/PaymentService/process"
body="{\"order_id\": \"$1\", \"amount\": $2}"
asked=$(printf %s "$body" | digest)
parameters="(\"@method\" \"@path\" \"@query\" \"repr-digest\" \"content-type\" \"nexus-request-id\");created=$(date +%s);keyid=\"k1\";tag=\"bridge-start\""
base="\"@method\": POST
\"@path\": /${url#*://*/}
\"@query\": ?
\"repr-digest\": $asked
\"content-type\": application/json
\"nexus-request-id\": order-$1
\"@signature-params\": $parameters"
signature=":$(printf %s "$base" | mac):"
curl --silent --show-error --dump-header "$answer/head" --output "$answer/body" --data "$body" \
    --header "Content-Type: application/json" --header "Nexus-Request-Id: order-$1" --header "Repr-Digest: $asked" \
    --header "Signature-Input: bridge=$parameters" --header "Signature: bridge=$signature" "$url"

# The answer: the components that its signature names, each with its value.
header() { sed -n "s/^$1: *//Ip" "$answer/head" | tr -d '\r'; }
parameters=$(header Signature-Input)
parameters=${parameters#bridge=}
components=${parameters#\(}
base=""
for component in ${components%%)*}; do
    name=${component#\"}
    name=${name%%\"*}
    case $component in
        '"@status"') value=$(sed -n '1s/^[^ ]* \([0-9]*\).*/\1/p' "$answer/head") ;;
        '"signature";req;key="bridge"') value=$signature ;;
        *) value=$(header "$name") ;;
    esac
    base+="$component: $value
"
done
base+="\"@signature-params\": $parameters"
for required in '"@status"' '"repr-digest"' '"signature";req;key="bridge"'; do
    [[ " ${components%%)*} " == *" $required "* ]] || { echo "not covered: $required" >&2 && exit 1; }
done
[ "$(header Signature)" = "bridge=:$(printf %s "$base" | mac):" ] || { echo "the answer's signature does not hold" >&2 && exit 1; }
[ "$(header Repr-Digest)" = "$(digest <"$answer/body")" ] || { echo "the answer's body was changed" >&2 && exit 1; }
cat "$answer/head" "$answer/body"
