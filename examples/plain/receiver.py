"""A receiver without Temporal. It prints every outcome that it receives as one line of JSON.

`python -m examples.plain.receiver PORT`. If COMPLETION_KEY is set, it accepts only completions signed with that key. A
production receiver always requires the signature, and its callback URLs are hard to guess.
"""

import json
import os
import sys

from aiohttp import web

from examples.plain.signatures import decode_key, is_signed, sign_answer


def create_app(completion_key: bytes | None) -> web.Application:
    """Callback URLs are `/completions/{name of the call}`."""

    async def complete(request: web.Request) -> web.Response:
        body, state = await request.read(), request.headers.get("Nexus-Operation-State")
        if completion_key is not None and not is_signed(
            "bridge-completion", request.raw_path, request.headers, body, key=completion_key
        ):
            return web.Response(status=401)
        if state != "running":  # `running` asks whether the caller still waits; the answer is yes
            outcome = {"call": request.match_info["call"], "state": state, "content": json.loads(body or "null")}
            print(json.dumps(outcome), flush=True)
        response = web.Response()
        if completion_key is not None:
            sign_answer(request.raw_path, request.headers, 200, response.headers, b"", key=completion_key)
        return response

    app = web.Application()
    app.router.add_post("/completions/{call}", complete)
    return app


if __name__ == "__main__":
    key = os.environ.get("COMPLETION_KEY")
    web.run_app(create_app(decode_key(key) if key else None), host="127.0.0.1", port=int(sys.argv[1]), print=None)
