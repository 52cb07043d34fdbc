"""OpenAI's HTTP interface over the embedded engine.

Open `app.py` for the routes, `bodies.py` for what a request may hold, `answers.py` for what is sent back, `service.py`
for the way from a checked request to the engine, `writing.py` from its tokens to text, `gate.py` for keys, hosts, sizes
and logs before a route, `keys.py`, `metrics.py` and `errors.py` for what their names say. It needs FastAPI (extra
`serve`); nothing else of the package may import it but the server that runs it.
"""
