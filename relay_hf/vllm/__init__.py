"""vLLM serves relay models: this plug-in is all that it needs, and `relay_hf` all that the plug-in needs.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes; nothing here
imports vLLM before. What a request passes, in this order:

- `config`: what registration changes in vLLM's configuration, and what is refused. `versions`: which vLLM.
- `checks`: the options of a request, checked where it arrives; `options`: read as `generate` reads them.
- `scheduler`: whole blocks only, and how many forwards a request took.
- `state`: ModelState of vLLM, one forward's inputs. `rows`: what each request is at; `plan`: what a step is about;
  `attention`: block-causal attention for any kernel.
- `model`: the backbone is vLLM's own, the channel the library's.
- `sampler`: reveals tokens, with policies, choice of tokens and channel of the library.

`internals` names all that vLLM does not document.
"""


def register() -> None:
    """Makes `RelayForMaskedDiffusion` known to vLLM; a second call changes nothing.

    Raises:
        ImportError: vLLM has a version that the plug-in does not know.
    """
    from .config import register_model
    from .versions import check_version

    check_version()
    register_model()
