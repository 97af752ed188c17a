"""What can be chosen on the command line of `relay-hf serve`, beside the model."""

from dataclasses import dataclass

from ..startup.options import option


@dataclass
class ServeArguments:
    """Arguments of the server; how a model decodes by default is in its `generation_config.json`."""

    host: str = option("localhost", "Address to listen on; 0.0.0.0 for all interfaces.")
    port: int = option(8000, "Port to listen on; 0 for a free one, which is printed.")
    device: str = option("auto", "Where the model runs, for instance cpu or cuda:0.")
    dtype: str = option("auto", "Its dtype, for instance bfloat16; auto is the saved one.")
    compile: bool = option(
        False, "Decode by static steps, which accelerators compile: the first requests take minutes, all others less."
    )
    max_batch_size: int = option(16, "The most requests that are decoded side by side; 1 decodes one at a time.")
    max_queue_size: int = option(256, "The most requests that wait for that; others are refused with status 503.")
    allow_hosts: list[str] = option(list, "Further names under which the server may be asked; * for any.")
    allow_origins: list[str] = option(
        list, "Web pages that may ask the server, for instance https://example.org; * for any."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"`--port={self.port}` must be between 0 and 65535.")
        if self.max_batch_size < 1:
            raise ValueError(f"`--max_batch_size={self.max_batch_size}` must be at least 1.")
        if self.max_queue_size < 0:
            raise ValueError(f"`--max_queue_size={self.max_queue_size}` must not be negative.")
