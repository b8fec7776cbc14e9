"""`lrnn serve`: transformers' server for a checkpoint, with mistakes told before it starts."""

import errno
import json
import shlex
import signal
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .files import user_path
from .requirements import check_extra
from .runs.layout import CheckpointFolder, checkpoint_folder
from .runs.load import describe, document_start, load_checkpoint
from .serve_requests import tell_mistakes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def serve(
    checkpoint: str | Path,
    host: str = "localhost",
    port: int = 8000,
    continuous_batching: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Answer requests over HTTP, by OpenAI's protocol, until a signal (Ctrl-C, SIGTERM) ends it.

    continuous_batching: decode requests together; only for models whose layers are all recurrent. The rest as
    of `generate`. Raises ValueError for a port in use, or a checkpoint that cannot be loaded;
    UnmetRequirementError where the extra `serve` is missing.
    """
    check_extra("serve", "fastapi", "uvicorn", "openai")
    _check_port(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder goes
    try:
        with TemporaryDirectory(prefix="lrnn-") as scratch:
            folder = _served(checkpoint, Path(scratch) / "model")
            # Loaded here first: this tells what is wrong with a folder, transformers' server would not.
            model, tokenizer = load_checkpoint(folder, device, trust_remote_code=trust_remote_code)
            _check_model(checkpoint, model, continuous_batching)
            settings = {"device": str(model.device), "trust_remote_code": trust_remote_code}
            print(_greeting(folder, host, port, model, tokenizer), flush=True)
            tell_mistakes(_start(model, tokenizer))
            del model
            from transformers.cli.serve import Serve
            from transformers.cli.serving.model_manager import ModelManager

            # transformers lists the hub's cache, without this folder, and fails where there is no cache.
            listed = {"id": str(folder), "object": "model", "created": int(time.time()), "owned_by": "lrnn"}
            ModelManager.get_gen_models = staticmethod(lambda: [listed])
            Serve(str(folder), host=host, port=port, continuous_batching=continuous_batching, **settings)
    except KeyboardInterrupt:  # uvicorn has answered the open requests, and raises the signal again
        return
    except SystemExit:  # of uvicorn, which has told why: the port may have been taken in the meantime
        raise ValueError(f"the server could not start at {host}, port {port}") from None


def _check_port(host: str, port: int) -> None:
    """Raise ValueError if nothing can listen there."""
    no_ipv6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) if host == "localhost" else ()
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                socket.create_server(address, family=family).close()
            except OSError as error:
                if error.errno not in no_ipv6:
                    raise
    except OSError as error:
        reason = (error.strerror or "").partition(" (")[0]  # create_server adds the address in brackets
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {reason}"
        raise ValueError(f"port {port} of {host} {why}; give another --port or --host") from None


def _served(checkpoint: str | Path, scratch: Path) -> Path:
    """The checkpoint's folder as transformers' server takes it; an export in `scratch` where it does not."""
    describe(checkpoint)  # it is one
    folder = checkpoint_folder(user_path(checkpoint))
    sharded = CheckpointFolder(folder).shards.is_dir() and not any(folder.glob("*.safetensors"))
    if not sharded and "@" not in str(folder):  # what follows @ would be a revision on the hub
        return folder
    from .api import export_checkpoint

    export_checkpoint(folder, scratch)
    return scratch


def _check_model(checkpoint: str | Path, model: "PreTrainedModel", continuous_batching: bool) -> None:
    """Raise ValueError for a model that could not answer a request."""
    import transformers

    kind = type(model).__name__
    if not hasattr(transformers, kind):
        raise ValueError(f"{checkpoint}: {kind} is no class of transformers, whose server cannot load others")
    if continuous_batching and model.config.model_type == "lrnn":
        from .model.decoding.batching import check_recurrent

        check_recurrent(model.config)


def _start(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of the token before every document, if the tokenizer does not add it."""
    start = document_start(model, tokenizer)
    return "" if start is None else tokenizer.decode([start])


def _greeting(
    folder: Path, host: str, port: int, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """Where it listens, and a command to try it."""
    body = {"model": str(folder), "prompt": f"{_start(model, tokenizer)}Once", "max_tokens": 40}
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    chats = "" if tokenizer.chat_template else " No chats: the tokenizer has no chat template."
    return (
        f"Serving at {address} (Ctrl-C ends it).{chats} Try: curl {address}/completions "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
