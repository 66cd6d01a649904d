#!/usr/bin/env bash
# Start one payment by curl, and print the answer: caller.sh ORDER_ID AMOUNT
#   SERVICE    base URL of the handler service for this caller: https://payments.example/c/shop
#   CALLBACK   where to POST the outcome: https://shop.example/completions/7
#   SECRET     for auth = "bearer"; START_KEY for auth = "signature"; neither for auth = "none"
# The request id comes from the order id. Therefore a second run makes no second payment.
set -euo pipefail
url="$SERVICE/PaymentService/process?callback=$CALLBACK"
body="{\"order_id\": \"$1\", \"amount\": $2}"
headers=("Content-Type: application/json" "Nexus-Request-Id: order-$1" "Operation-Timeout: 60m")
if [ -n "${SECRET:-}" ]; then
    headers+=("Authorization: Bearer $SECRET")
fi
if [ -n "${START_KEY:-}" ]; then
    python3 -m examples.plain.signatures bridge-start "$url" "$body" "${headers[@]}"
else
    printf '%s\n' "${headers[@]}"
fi | curl --silent --show-error --include --header @- --data "$body" "$url"
