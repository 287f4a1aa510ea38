"""A receiver of webhooks in the standard library and `standardwebhooks`: verifies, drops repeats, prints.

export OPS_SECRET="whsec_$(openssl rand -base64 32)"
python examples/webhook_receiver.py                # listens on http://127.0.0.1:8808/

and in targets.yaml, of a stack started with the same OPS_SECRET:

webhooks:
  ops: {url: "http://127.0.0.1:8808/", secret: "${OPS_SECRET}", allow_insecure: true, all_batches: true}
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

MOST_BYTES = 1024 * 1024
seen: set[str] = set()  # of a real receiver: in its database, in the transaction that handles the event


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if length > MOST_BYTES:
            return self.answer(413)
        body = self.rfile.read(length)  # the bytes as they came: never parsed and written anew before they are verified
        try:
            event = Webhook(os.environ["OPS_SECRET"]).verify(body, dict(self.headers))
        except WebhookVerificationError as error:
            print(f"refused: {error}", flush=True)
            return self.answer(401)
        if self.headers["webhook-id"] not in seen:
            seen.add(self.headers["webhook-id"])
            handle(event)
        return self.answer(204)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def handle(event: dict[str, Any]) -> None:
    data = event["data"]
    if event["type"].startswith("batch."):
        counts = data["request_counts"]
        why = f" ({data['error']['message']})" if data["error"] else ""
        print(f"{event['type']} {data['id']}: {counts['completed']} of {counts['total']} answered{why}", flush=True)
    else:
        print(f"{event['type']} {json.dumps(data)}", flush=True)


if __name__ == "__main__":
    if "OPS_SECRET" not in os.environ:
        sys.exit("Set OPS_SECRET to the secret of the target in targets.yaml.")
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8808), Receiver)
    print(f"listening on http://127.0.0.1:{server.server_address[1]}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
