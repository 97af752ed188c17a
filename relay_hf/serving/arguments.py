"""What can be chosen on the command line of `relay-hf serve`, beside the model."""

from dataclasses import dataclass, field


@dataclass
class ServeArguments:
    """Arguments of the server; how a model decodes by default is in its `generation_config.json`."""

    host: str = field(default="localhost", metadata={"help": "Address to listen on; 0.0.0.0 for all interfaces."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for a free one, which is printed."})
    device: str = field(default="auto", metadata={"help": "Where the model runs, for instance cpu or cuda:0."})
    dtype: str = field(default="auto", metadata={"help": "Its dtype, for instance bfloat16; auto is the saved one."})
    allow_hosts: list[str] = field(
        default_factory=list,
        metadata={"help": "Further names under which the server may be asked; * for any."},
    )
    allow_origins: list[str] = field(
        default_factory=list,
        metadata={"help": "Web pages that may ask the server, for instance https://example.org; * for any."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"`--port={self.port}` must be between 0 and 65535.")
