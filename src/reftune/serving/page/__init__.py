"""The page at `/`: chat beside the base, train from a file, look into an adapter. A client of the same server.

Open `routes.py` for what the page asks beyond OpenAI's interface, `training.py` for runs started from it, `looking.py`
for the pictures of an adapter; `index.html`, `page.css` and `page.js` are the page itself, without a build step or
anything fetched from elsewhere. It must not import the engine: what it needs goes through `serving.api` or a process
of its own.
"""
