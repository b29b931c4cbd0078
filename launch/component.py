"""The TorchX component: `torchx run -s SCHEDULER ultrarec.train --config RECIPE -- section.field=value ...`.

TorchX lists every function of this module as a component and reads its signature, so it holds that one function, its
helpers come in as a module, and annotations are not postponed.
"""

from torchx import specs

from ..trainer import config as configuration
from . import application


def train(
    *overrides: str,
    config: str,
    out: str = "",
    j: str = "",
    image: str = "",
    torchrun: str = "torchrun",
    rdzv_port: int = application.RENDEZVOUS_PORT,
) -> specs.AppDef:
    """Train a recipe on one or more nodes.

    Args:
        overrides: settings of the recipe to change, as section.field=value
        config: name of a recipe, or path of a TOML file that every node can read
        out: run folder (default: runs/ and the recipe's name)
        j: NODESxPROCS or MIN:MAXxPROCS (default: the recipe's launch section)
        image: container image (default: the recipe's launch.image)
        torchrun: the command on the nodes; give a path where it is not on PATH
        rdzv_port: port on the first node where the others join; unused on one node
    """
    settings = configuration.load_config(config, overrides)
    if image:
        settings = settings.model_copy(update={"launch": settings.launch.model_copy(update={"image": image})})
    return application.build(
        settings,
        recipe=config,
        overrides=overrides,
        out=out or application.default_out(config),
        size=application.Size.of(settings, j),
        torchrun=torchrun,
        port=rdzv_port,
    )
