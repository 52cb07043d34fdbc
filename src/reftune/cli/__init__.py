"""The command line: parse, call, print. It holds no rule of the domain, and nothing imports it.

`app.py` turns errors into a message and an exit status, `flags.py` makes options of a dataclass's fields,
`common_options.py` has the options that commands share, `results.py` the tables that several print; every other file
is one command (`sign.py` two), imported when it is called.
"""

from reftune.cli.app import Command, Commands, app, main

__all__ = ["app", "main"]

Commands.registered = (
    Command("demo", "demo", "demo"),
    Command("train", "train", "train"),
    Command("steer", "steer", "steer"),
    Command("generate", "generate", "generate"),
    Command("chat", "chat", "chat"),
    Command("eval", "evaluate", "evaluate"),
    Command("predict", "predict", "predict"),
    Command("compare", "compare", "compare"),
    Command("sweep", "sweep", "sweep"),
    Command("serve", "serve", "serve", {"ignore_unknown_options": True}),
    Command("store", "store", "store"),
    Command("adapt", "adapt", "adapt"),
    Command("info", "info", "info"),
    Command("sign", "sign", "sign"),
    Command("verify", "sign", "verify"),
    Command("env", "env", "env"),
    Command("import-pyreft", "import_pyreft", "import_pyreft"),
    Command("lm-eval", "lm_eval", "lm_eval", {"ignore_unknown_options": True, "help_option_names": []}),
)
